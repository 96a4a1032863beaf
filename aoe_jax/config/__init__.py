"""The configuration of a run: frozen dataclasses, a file per group of `--config.GROUP.FIELD=VALUE`.

A file of `configs/` returns an `ml_collections.ConfigDict`. `storage.config_files` reads it, and
`run.Config.from_config_dict` checks it: first every group alone, then all groups together.
"""
