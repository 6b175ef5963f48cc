"""The place where Hydra finds the sweeper of `psp-train -m hparams_search=optuna`: it accepts no other package."""

from psp_lightning.cli.search import Search


class OptunaSweeper(Search):
    """The sweeper that conf/hydra/sweeper/search.yaml names."""
