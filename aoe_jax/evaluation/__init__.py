"""Loads trained models, evaluates them on splits, texts and tasks, and generates text."""
