"""Uses trained models: loads them, scores splits, texts and tasks, generates, probes routers."""
