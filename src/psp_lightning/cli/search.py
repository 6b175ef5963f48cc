"""A search over settings with Optuna: a sweeper for Hydra whose study is stored, so that a stopped search continues."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from psp_lightning.build.instantiate import instantiate
from psp_lightning.cli.mistakes import message
from psp_lightning.cli.resume import plain_settings
from psp_lightning.cli.search_space import search_space
from psp_lightning.cli.trial import RESULT, Pruned, check_objective, open_storage, optuna_package
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError, plural

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("psp_train")
# attributes of a study: numbers of trials; the folder of its search; the settings that all trials share
INTERRUPTED, FOLDER, SHARED = "interrupted", "folder", "settings"
ERROR, RUN = "error", "run"  # attributes of a trial: why it failed; its run folder, relative to the search's folder
# settings without an influence on the results, which a continued search may change
FREE = (
    "paths.", "run.", "resume.", "logger.", "metric.", "callbacks.", "plugins.", "data.num_workers",
    "model.checkpointing", "model.compile", "trainer.enable_progress_bar", "trainer.log_every_n_steps",
)  # fmt: skip
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": INTERRUPTED, "WAITING": "waiting"}


class Search(Sweeper):
    """Runs trials until the study has `n_trials` of them; conf/hydra/sweeper/search.yaml explains the arguments.

    The trial with number n is job n of the sweep. A trial that runs when the search is stopped or killed counts as
    interrupted, and the next search in the folder tries its settings again. A job that fails is a failed trial.

    Raises:
        UserError: an argument is invalid, the storage cannot be opened, no trial was completed, or too many failed.
    """

    def __init__(
        self, storage: str, study_name: str, direction: str, n_trials: int, n_jobs: int, max_failure_rate: float,
        sampler: DictConfig, pruner: DictConfig | None, params: DictConfig | None,
    ) -> None:  # fmt: skip
        self.storage, self.study_name, self.direction = str(storage), str(study_name), direction
        self.place = re.sub(r"(://[^:@/]*):.*@", r"\1:***@", self.storage)  # for messages: without a password
        self.n_trials, self.n_jobs, self.max_failure_rate = n_trials, n_jobs, max_failure_rate
        self.params: dict[str, Any] = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra passes, and build the launcher."""
        self.config = self.cfg = config  # `config` may be None for the base class
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search.

        Args:
            arguments: the settings of the command line, with values or ranges.
        """
        if self.direction not in ("minimize", "maximize"):  # checked here: Hydra rewords the errors of a constructor
            raise UserError(f"hydra.sweeper.direction={self.direction} must be minimize or maximize.")
        self.n_trials = whole("hydra.sweeper.n_trials", self.n_trials, 1)
        self.n_jobs = whole("hydra.sweeper.n_jobs", self.n_jobs, 1)
        number("hydra.sweeper.max_failure_rate", self.max_failure_rate, 0, 1)
        params = (f"{key}={'null' if value is None else value}" for key, value in self.params.items())
        space, fixed = search_space([*params, *arguments])
        if not space:
            raise UserError("the search has no settings to choose: add one such as 'optimizer.lr=interval(1e-4,1e-3)'.")
        shared = self._check(space, fixed)
        self.folder = Path(self.cfg.hydra.sweep.dir)
        study = self._open(space)
        self._compare(study, shared)
        repeat = self._interrupted(study, space)
        try:
            while (left := self.n_trials - len(self._finished(study))) > 0:
                trials = [self._ask(study, space, repeat) for _ in range(min(left, self.n_jobs))]
                self._run(study, trials, fixed)
                self._save(study, list(space))
                failed = sum(trial.state.name == "FAIL" for trial in self._finished(study))
                if failed > self.max_failure_rate * self.n_trials:
                    raise UserError(
                        f"{failed} of {plural(self.n_trials, 'trial')} failed, more than hydra.sweeper."
                        f"max_failure_rate={self.max_failure_rate:g} allows."
                    )
        except BaseException:
            with contextlib.suppress(Exception):  # it would hide the error
                self._collect(study)
                print(self._save(study, list(space)))
            raise
        print(self._save(study, list(space)))
        if not any(trial.state.name == "COMPLETE" for trial in study.trials):
            raise UserError("no trial of the search was completed; the table above gives the reason for each.")

    def _check(self, space: dict[str, Any], fixed: list[str]) -> dict[str, Any]:
        """Compose jobs with every choice and both ends of each range; return the settings that all trials share.

        A mistake that this finds adds no trial to the study.
        """
        assert self.config is not None and self.hydra_context is not None
        values = [getattr(range_, "choices", None) or (range_.low, range_.high) for range_ in space.values()]
        first: dict[str, Any] = {}
        for i in range(max(map(len, values))):
            given = [*fixed, *(f"{name}={few[i % len(few)]}" for name, few in zip(space, values, strict=True))]
            job = self.hydra_context.config_loader.load_sweep_config(self.config, given)
            for name in map(str, job):
                if name == "hydra" or f"{name}.".startswith(FREE):  # some of these exist only in a job
                    continue
                node = job[name]
                if OmegaConf.is_config(node):
                    if missing := sorted(OmegaConf.missing_keys(node)):
                        raise UserError("must be given: " + " ".join(f"{key}=..." for key in missing))
                    node = OmegaConf.to_container(node, resolve=True)
                if i == 0:
                    first[name] = node
            check_objective(job)
        shared = {key: value for key, value in plain_settings(first).items() if key not in space}
        stored: dict[str, Any] = json.loads(json.dumps(shared))  # as the study will return it
        return stored

    def _open(self, space: dict[str, Any]) -> optuna.Study:
        """Create the study, or open it if it exists and has the same kinds of ranges."""
        optuna = optuna_package()
        inside = "://" not in self.storage and self.folder.resolve() in Path(self.storage).resolve().parents
        try:
            study = optuna.create_study(
                storage=open_storage(self.storage), study_name=self.study_name, direction=self.direction,
                load_if_exists=True,
            )  # fmt: skip
            before = study.user_attrs.get(FOLDER)
            if inside or before is None:
                study.set_user_attr(FOLDER, os.path.abspath(self.folder))
        except Exception as error:  # of the database, which may be any
            text = (str(error).splitlines() or [type(error).__name__])[0].replace(self.storage, self.place)
            raise UserError(f"hydra.sweeper.storage={self.place}: {text}") from error
        if not inside and before not in (None, os.path.abspath(self.folder)):
            raise UserError(
                f"the study {self.study_name} in {self.place} belongs to the search in {before}. Continue it with "
                f"hydra.sweep.dir={before}, or choose another hydra.sweeper.study_name=NAME."
            )
        if study.direction.name.lower() != self.direction:
            raise UserError(f"the study in {self.place} was started with another hydra.sweeper.direction.")
        for name, old in [pair for trial in study.trials for pair in trial.distributions.items() if pair[0] in space]:
            try:
                optuna.distributions.check_distribution_compatibility(old, space[name])
            except ValueError as error:  # for example, a choice with other options; an interval may change
                raise UserError(f"{name}: {error} Such a range needs a new hydra.sweep.dir=DIR.") from error
        seed = self.cfg.hydra.sweeper.sampler.get("seed")
        # a sampler starts again with its seed: a continued search must not repeat the first trials
        own = {} if seed is None else {"seed": whole("hydra.sweeper.sampler.seed", seed, 0) + len(study.trials)}
        study.sampler = instantiate(self.cfg, "hydra.sweeper.sampler", **own)
        return study

    def _compare(self, study: optuna.Study, now: Mapping[str, Any]) -> None:
        """Raise a UserError if trials with results had other settings, because they would not be comparable."""
        before = study.user_attrs.get(SHARED)
        if before is None or not _has_results(study):
            study.set_user_attr(SHARED, now)
            return
        unset = "not set"
        keys = [key for key in sorted({*before, *now}) if before.get(key, unset) != now.get(key, unset)]
        if keys := [key for key in keys if not key.startswith(FREE)]:
            changes = "; ".join(f"{key}: {before.get(key, unset)} -> {now.get(key, unset)}" for key in keys[:5])
            changes += f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise UserError(
                f"the search in {self.folder} was started with other settings, so its trials would not be comparable: "
                f"{changes}. Repeat those settings, or choose another hydra.sweep.dir=DIR."
            )

    def _collect(self, study: optuna.Study) -> None:
        """Tell the study the results of jobs that ended after their search was stopped."""
        for trial in study.trials:
            file = self.folder / str(trial.number) / RESULT
            if trial.state.name == "RUNNING" and file.is_file():
                result = json.loads(file.read_text(encoding="utf-8"))
                study.tell(trial.number, result["value"], state=optuna_package().trial.TrialState[result["state"]])

    def _interrupted(self, study: optuna.Study, space: dict[str, Any]) -> list[dict[str, Any]]:
        """End the trials that an earlier search left; return the values that are to be tried again."""
        self._collect(study)
        left = [trial.number for trial in study.trials if trial.state.name == "RUNNING"]
        study.set_user_attr(INTERRUPTED, [*study.user_attrs.get(INTERRUPTED, []), *left])
        for n in left:
            study.tell(n, state=optuna_package().trial.TrialState.FAIL)
        done = self._finished(study)
        if study.trials:
            log.info("continuing the search in %s: %s finished", self.folder, plural(len(done), "trial"))
        tried = [trial.params for trial in done]
        tried += [trial.system_attrs.get("fixed_params", {}) for trial in study.trials if trial.state.name == "WAITING"]
        numbers = study.user_attrs[INTERRUPTED]
        lost = [{name: value for name, value in study.trials[n].params.items() if name in space} for n in numbers]
        return [  # a trial that was killed while its values were chosen has only some of them
            values for values in lost
            # not a second time: the values may be what ends the process
            if values and lost.count(values) == 1 and not any(values.items() <= other.items() for other in tried)
            and all(space[name]._contains(space[name].to_internal_repr(value)) for name, value in values.items())
        ]  # fmt: skip

    def _finished(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that ended by themselves."""
        interrupted = study.user_attrs[INTERRUPTED]
        return [trial for trial in study.trials if trial.state.is_finished() and trial.number not in interrupted]

    def _ask(self, study: optuna.Study, space: dict[str, Any], repeat: list[dict[str, Any]]) -> optuna.Trial:
        """Start a trial and choose its values."""
        if repeat:
            study.enqueue_trial(repeat.pop(0))
        return study.ask(space)

    def _run(self, study: optuna.Study, trials: Sequence[optuna.Trial], fixed: list[str]) -> None:
        """Run trials as jobs and record how each of them ended."""
        numbers = [trial.number for trial in trials]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise UserError(f"another search is writing to the study {self.study_name} in {self.place}.")
        for n in numbers:  # a result in it would be taken for the trial's
            if (folder := self.folder / str(n)).exists():
                raise UserError(f"{folder} is not a run of this search. Choose another hydra.sweep.dir=DIR.")
        jobs = [[*fixed, *(f"{name}={value}" for name, value in trial.params.items())] for trial in trials]
        self.validate_batch_is_legal(jobs)
        assert self.launcher is not None
        try:
            returns = self.launcher.launch(jobs, initial_job_idx=numbers[0])
        except Exception as error:
            rejected = isinstance(error.__cause__, subprocess.CalledProcessError)  # by sbatch: no job was started
            if rejected or len(trials) > 1 or type(error).__module__.split(".")[0] not in ("joblib", "submitit"):
                raise
            returns = [JobReturn(status=JobStatus.FAILED, _return_value=error)]  # its process ended
        for trial, job in zip(trials, returns, strict=True):
            self._record(study, trial, job)

    def _record(self, study: optuna.Study, trial: optuna.Trial, job: JobReturn) -> None:
        """Tell the study how a job ended."""
        state = optuna_package().trial.TrialState
        result = job._return_value
        if job.hydra_cfg is not None:
            trial.set_user_attr(RUN, os.path.relpath(job.hydra_cfg.hydra.runtime.output_dir, self.folder))
        if isinstance(result, Pruned):
            study.tell(trial, state=state.PRUNED)
        elif job.status == JobStatus.COMPLETED and result is not None and not math.isnan(result):
            study.tell(trial, result)
        else:
            error = result if isinstance(result, Exception) else UserError(f"{self.cfg.objective} has no value.")
            run = self.folder / trial.user_attrs.get(RUN, str(trial.number))
            begun = (run / "config.yaml").exists()  # written when the training starts
            if isinstance(result, UserError) and not begun and not _has_results(study):
                raise UserError(f"trial {trial.number} could not start: {message(result)}")
            log.warning("trial %d failed: %s", trial.number, message(error))
            lines = message(error).strip().splitlines() or [""]
            expected = isinstance(error, UserError | OSError)
            trial.set_user_attr(ERROR, lines[0] if expected else f"{type(error).__name__}: {lines[-1]}")
            study.tell(trial, state=state.FAIL)

    def _save(self, study: optuna.Study, names: list[str]) -> str:
        """Write the table of all trials, and the best values for programs to read; return what to print."""
        from psp_lightning.lit.results import save_rows

        trials, interrupted = study.trials, study.user_attrs[INTERRUPTED]
        names = list(dict.fromkeys([*names, *(name for trial in trials for name in trial.params)]))
        rows: list[list[Any]] = [["trial", "state", self.cfg.objective, *names, "run", "error"]]
        for trial in trials:
            state = "interrupted" if trial.number in interrupted else STATES[trial.state.name]
            run = self.folder / trial.user_attrs.get(RUN, str(trial.number))
            rows.append([
                trial.number, state, trial.value, *(trial.params.get(name) for name in names),
                str(run) if run.is_dir() else None, trial.user_attrs.get(ERROR),
            ])  # fmt: skip
        text, best = save_rows(self.folder, "sweep", rows), None
        if any(trial.state.name == "COMPLETE" for trial in trials):
            best = study.best_trial
            result = {"name": "optuna", "best_params": best.params, "best_value": best.value}
            with replacing(self.folder / "optimization_results.yaml") as part:
                OmegaConf.save(OmegaConf.create(result), part)
        first = "" if best is None else f"best: trial {best.number}, {self.cfg.objective} {best.value:.4g}; "
        return f"{text}{first}{self.folder / 'sweep.md'}, {self.folder / 'sweep.csv'}"


def _has_results(study: optuna.Study) -> bool:
    """Return whether a trial of the study has reported a value."""
    return any(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
