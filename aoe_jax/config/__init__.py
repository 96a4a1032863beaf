"""The configuration of a run: frozen dataclasses, a file per group of `--config.GROUP.FIELD=VALUE`.

`configs/*.py` return an `ml_collections.ConfigDict`, which `storage.config_files` reads, and
`run.Config.from_config_dict` checks it: every group by itself, then its `check` against the others.
"""
