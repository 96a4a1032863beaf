"""The configuration of a run: one frozen dataclass for each group of settings.

A flag `--config.GROUP.FIELD=VALUE` sets a field. A file of `configs/` returns a `ConfigDict`, which
`run.Config.from_config_dict` checks: first every group alone, then all groups together.
"""

VERSION = 2  # the version of stored configurations; a missing number means version 1
