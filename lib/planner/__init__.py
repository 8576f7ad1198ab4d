"""Will it fit, how long does it take, what does it cost: told before anything is started.

architecture.py   the shape of a model, from config.json and safetensors headers or by name; no weights are read
activations.py    what the forward pass keeps for the backward pass
memory.py         bytes on each GPU and host, by part and by phase, as DeepSpeed allocates them
hardware.py       accelerators, and this machine
timing.py         step time by a roofline, the run's time and cost, checkpoints
layouts.py        every layout of a configuration, which fit, which is cheapest
tables.py         the report as text
manifests.py      the recommended layout as Kubernetes has it: a RayJob, and a RayService for the model
check.py          refuses what this machine cannot hold
"""
