"""The small system that comes with the project, a pipeline folder; installed as `crocodil_weights`. See README.md."""
