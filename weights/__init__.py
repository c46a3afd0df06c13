"""Where the small system that comes with the project lies, a pipeline folder; installed as `crocodil_weights`."""
