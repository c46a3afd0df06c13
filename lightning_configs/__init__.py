"""Complete, runnable configurations, one YAML per experiment; installed as `crocodil_configs`."""
