"""What is submitted to the cluster: one module a job, `python -m jobs.NAME --config FILE`."""
