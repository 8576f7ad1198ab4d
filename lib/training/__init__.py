"""From a dataset to a model, on Ray Train workers that each run a DeepSpeed engine.

fit.py          the driver's side: checks, the trainer, the export of the best checkpoint
trainer.py      Ray's trainer, with our cleaner.py: a run that is ended from outside leaves no slot taken
resume.py       which unfinished run to go on with
loop.py         a worker's side: steps, validation, early stopping, going on from a checkpoint
windows.py      which rows come when, and how Ray Data deals them to the workers
batches.py      batches of like lengths, the same number on every worker
checkpoints.py  what a checkpoint holds, and which of them are whole
search.py       many trainings at once, by Ray Tune; space.py, what may be tried; trials_plots.py, their pictures
population.py   population based training: trials that take over from better ones
trainable.py    which parameters are trained and how fast; adapters.py, LoRA and DoRA among them
restore.py      from a checkpoint to one whole model, for the export
overrides.py    a user's own DeepSpeed configuration over ours
zero.py         DeepSpeed: its configuration, the engine, its checkpoints, what was trained out of them
dropout.py      dropout at the speed of the rest, on a CPU
curves.py       the run's curves as a picture
"""
