"""The demo: all stages on the embedded checkpoint, sized for two CPU cores and a few minutes.

Planned and trained twice: at the input bits that the paper's rule spends, and then with the fewest
bits under which what was trained says that the errors of weights and inputs meet.
"""

from collections.abc import Iterator
from pathlib import Path

from bitplan.options import PlanOptions, ProfileOptions, VerifyOptions

EMBEDDED = Path(__file__).parent / "embedded"


def run_demo(run: Path) -> Iterator[str]:
    """Yield each stage's text as the stage ends; the last line is the path of the report.

    The stages skip what `run` already holds. The verdict is the demo's finding, not its success:
    a plan that does not converge is reported as such and the demo still ends.
    """
    from bitplan.planner.stage import make_plan
    from bitplan.probe.profile import profile_checkpoint
    from bitplan.qat.verify import verify_plan
    from bitplan.reports.report import write_report
    from bitplan.tables import TRAINED

    yield profile_checkpoint(run, ProfileOptions(model=str(EMBEDDED))).as_text()
    if not (run / TRAINED.file).is_file():
        yield make_plan(run, PlanOptions()).as_text()
        yield verify_plan(run, VerifyOptions()).as_text()
    yield make_plan(run, PlanOptions(converge=True)).as_text()
    yield verify_plan(run, VerifyOptions()).as_text()
    yield write_report([run], None).as_text()
