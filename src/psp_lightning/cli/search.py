"""A search over settings with Optuna: a sweeper for Hydra whose study is stored, so that a stopped search continues."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from psp_lightning.build.instantiate import instantiate
from psp_lightning.cli.mistakes import message
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError, plural

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("psp_train")
INTERRUPTED, FOLDER = "interrupted", "folder"  # attributes of a study: numbers of trials; the folder of its search
ERROR, RUN = "error", "run"  # attributes of a trial: why it failed; its run folder, relative to the search's folder
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": INTERRUPTED, "WAITING": "waiting"}
RESULT = "objective.json"  # in the run folder of a trial that has ended: its state and value


class Pruned(float):
    """The last value of a trial that ended early because other trials are better."""


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
        self.place = re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", self.storage)  # for messages: without a password
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
        self._check(space, fixed)
        self.folder = Path(self.cfg.hydra.sweep.dir)
        study = self._open(space)
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

    def _check(self, space: dict[str, Any], fixed: list[str]) -> None:
        """Compose jobs with every choice, so that a mistake in the settings adds no trial to the study."""
        values = [getattr(distribution, "choices", None) or (distribution.low,) for distribution in space.values()]
        for i in range(max(map(len, values))):
            job = [*fixed, *(f"{name}={few[i % len(few)]}" for name, few in zip(space, values, strict=True))]
            assert self.config is not None and self.hydra_context is not None
            check_objective(self.hydra_context.config_loader.load_sweep_config(self.config, job))

    def _open(self, space: dict[str, Any]) -> optuna.Study:
        """Create the study, or open it if it exists and has the same kinds of ranges."""
        optuna = _optuna()
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
            except ValueError as error:  # for example, a choice with other options
                raise UserError(f"{name}: {error} A changed range needs a new hydra.sweep.dir=DIR.") from error
        seed = self.cfg.hydra.sweeper.sampler.get("seed")
        # a sampler starts again with its seed: a continued search must not repeat the first trials
        own = {} if seed is None else {"seed": whole("hydra.sweeper.sampler.seed", seed, 0) + len(study.trials)}
        study.sampler = instantiate(self.cfg, "hydra.sweeper.sampler", **own)
        return study

    def _collect(self, study: optuna.Study) -> None:
        """Tell the study the results of jobs that ended although their search was stopped before it could."""
        for trial in study.trials:
            file = self.folder / str(trial.number) / RESULT
            if trial.state.name == "RUNNING" and file.is_file():
                result = json.loads(file.read_text(encoding="utf-8"))
                study.tell(trial.number, result["value"], state=_optuna().trial.TrialState[result["state"]])

    def _interrupted(self, study: optuna.Study, space: dict[str, Any]) -> list[dict[str, Any]]:
        """End the trials that an earlier search left; return the values that are to be tried again."""
        self._collect(study)
        left = [trial.number for trial in study.trials if trial.state.name == "RUNNING"]
        study.set_user_attr(INTERRUPTED, [*study.user_attrs.get(INTERRUPTED, []), *left])
        for n in left:
            study.tell(n, state=_optuna().trial.TrialState.FAIL)
        done = self._finished(study)
        if study.trials:
            log.info("continuing the search in %s: %s finished", self.folder, plural(len(done), "trial"))
        tried = [trial.params for trial in done]
        tried += [trial.system_attrs.get("fixed_params", {}) for trial in study.trials if trial.state.name == "WAITING"]
        numbers = study.user_attrs[INTERRUPTED]
        lost = [{name: value for name, value in study.trials[n].params.items() if name in space} for n in numbers]
        return [  # a trial that was killed while its values were chosen has only some of them
            values for i, values in enumerate(lost)
            if values and values not in lost[:i] and not any(values.items() <= other.items() for other in tried)
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
        state = _optuna().trial.TrialState
        result = job._return_value
        if job.hydra_cfg is not None:
            trial.set_user_attr(RUN, os.path.relpath(job.hydra_cfg.hydra.runtime.output_dir, self.folder))
        if isinstance(result, Pruned):
            study.tell(trial, state=state.PRUNED)
        elif job.status == JobStatus.COMPLETED and result is not None and not math.isnan(result):
            study.tell(trial, result)
        else:
            error = result if isinstance(result, Exception) else UserError(f"{self.cfg.objective} has no value.")
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


def search_space(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the Optuna distribution of each setting that has a range, and the settings that have one value.

    Args:
        overrides: settings in Hydra's grammar. The last one of a setting counts.

    Raises:
        UserError: a function of Hydra's grammar cannot be searched.
    """
    space: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.get_key_element()
        space.pop(name, None)
        fixed.pop(name, None)
        if override.is_sweep_override():
            space[name] = _distribution(override)
        else:
            fixed[name] = str(override.input_line)
    return space, list(fixed.values())


def _distribution(override: Override) -> Any:
    """Return the Optuna distribution of a setting with a range; raise a UserError if there is none."""
    optuna = _optuna()
    value: Any = override.value()
    numbers = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
    try:
        if override.is_interval_sweep():
            integers = isinstance(value.start, int) and isinstance(value.end, int)
            return numbers[integers](value.start, value.end, log="log" in value.tags)
        if override.is_range_sweep() and not value.shuffle:
            if not value.step:
                raise ValueError("the step must not be 0")
            integers = all(isinstance(part, int) for part in (value.start, value.stop, value.step))
            n = math.ceil((value.stop - value.start) / value.step - 1e-9)  # `stop` is not in the range
            return numbers[integers](value.start, value.start + (n - 1) * value.step, step=value.step)
        if override.is_choice_sweep() or override.is_range_sweep():
            return optuna.distributions.CategoricalDistribution(
                list(override.sweep_iterator(transformer=Transformer.encode))
            )
    except (ValueError, TypeError) as error:
        raise UserError(f"{override.input_line}: {error}") from error
    raise UserError(f"{override.input_line}: a search takes interval(A,B), choice(A,B) and range(A,B).")


def open_storage(place: str) -> Any:
    """Return the storage of a study: a database's URL, or the file at `place`, whose folder is created."""
    if "://" in place:
        return place
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith(".log"):
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        return JournalStorage(JournalFileBackend(place))
    return f"sqlite:///{place}"


@dataclass(frozen=True)
class TrialPlace:
    """Where a job finds its own trial, to report values while it runs. It can be pickled.

    Attributes:
        storage: a URL, or the absolute path of a file.
        study_name: name of the study.
        number: number of the trial.
        pruner: node of the pruner, as YAML text.
    """

    storage: str
    study_name: str
    number: int
    pruner: str

    def open(self) -> optuna.Trial:
        """Return the trial, which can report values and be asked whether it should end."""
        optuna = _optuna()
        pruner = instantiate(OmegaConf.create({"hydra": {"sweeper": {"pruner": OmegaConf.create(self.pruner)}}}),
                             "hydra.sweeper.pruner")  # fmt: skip
        study = optuna.load_study(
            study_name=self.study_name, storage=open_storage(self.storage), pruner=pruner,
            sampler=optuna.samplers.RandomSampler(),  # not used: the values are chosen
        )  # fmt: skip
        return optuna.Trial(study, study.trials[self.number]._trial_id)


def check_search(cfg: DictConfig) -> TrialPlace | None:
    """Return the place of this job's trial if trials may be pruned; None otherwise, and outside a search.

    Raises:
        UserError: no validation would measure the objective, or `-m` is missing.
    """
    hydra = HydraConfig.get()
    if not _is_search():
        if hydra.mode != RunMode.MULTIRUN and not _is_basic() and cfg.resume is None:
            raise UserError("hparams_search= selects a search, which needs -m: psp-train -m hparams_search=...")
        return None
    check_objective(cfg)
    sweeper = hydra.sweeper
    if sweeper.get("pruner") is None:
        return None
    storage = sweeper.storage if "://" in sweeper.storage else os.path.join(hydra.runtime.cwd, sweeper.storage)
    return TrialPlace(storage, sweeper.study_name, int(hydra.job.num), OmegaConf.to_yaml(sweeper.pruner, resolve=True))


def check_objective(cfg: DictConfig) -> None:
    """Raise a UserError if no validation of a training would measure the objective."""
    if cfg.objective is None:
        raise UserError("a search needs an objective=NAME, such as val/loss.")
    if not cfg.trainer.limit_val_batches or cfg.trainer.val_every > cfg.trainer.max_steps:
        raise UserError(
            f"objective={cfg.objective} would not be measured, because there is no validation: trainer.val_every="
            f"{cfg.trainer.val_every}, trainer.max_steps={cfg.trainer.max_steps}, trainer.limit_val_batches="
            f"{cfg.trainer.limit_val_batches}. Set trainer.val_every={cfg.trainer.max_steps} or less."
        )


def keep_result(cfg: DictConfig, value: float | None) -> float | None:
    """Return the value of a job; in a search, also write it to the run folder.

    A search that runs several trials at the same time learns their values when all of them have ended. If it is stopped
    before that, it finds the values in the files.
    """
    if _is_search() and value is not None and math.isfinite(value):
        pruned = isinstance(value, Pruned)  # its last report is its value
        result = {"state": "PRUNED" if pruned else "COMPLETE", "value": None if pruned else float(value)}
        with replacing(Path(cfg.paths.output_dir, RESULT)) as part:
            part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return value


def _is_basic() -> bool:
    """Return whether the sweeper of this job is Hydra's own."""
    return str(HydraConfig.get().sweeper.get("_target_")).endswith("BasicSweeper")


def _is_search() -> bool:
    """Return whether this job is a trial of a search."""
    return HydraConfig.get().mode == RunMode.MULTIRUN and not _is_basic()


def _optuna() -> Any:
    """Return the package optuna; raise a UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"a search needs the package optuna: pip install 'psp-lightning[sweep]' ({error})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
