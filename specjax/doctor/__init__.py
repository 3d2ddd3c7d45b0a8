"""Do the kernels work on this machine? Checked once in processes that may fail, and remembered.

    folder = pathlib.Path.home() / ".cache" / "specjax" / "doctor"
    verdicts = doctor.known_or_checked(folder)
    model = specjax.load(path, backend=verdicts.policy(), command_buffers=verdicts.command_buffers())

Nothing is global: what fails here goes, as the value `policy()`, to whoever chooses backends.
"""

from specjax.doctor.examination import FAMILIES, Family, Limits, check, known_or_checked
from specjax.doctor.verdicts import Verdict, Verdicts

__all__ = ["FAMILIES", "Family", "Limits", "Verdict", "Verdicts", "check", "known_or_checked"]
