"""Ray Serve applications: one module an application; `config.yaml` deploys them all."""
