"""From a dataset to a model, on Ray Train workers that each run a DeepSpeed engine.

fit.py       the driver's side: checks, the trainer, the export of the best checkpoint
loop.py      a worker's side: steps, validation, early stopping, checkpoints
batches.py   batches of like lengths, the same number on every worker
zero.py      DeepSpeed: its configuration, the engine, consolidated weights
dropout.py   dropout at the speed of the rest, on a CPU
curves.py    the run's curves as a picture
"""
