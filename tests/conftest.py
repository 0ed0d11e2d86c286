"""The Hypothesis profiles: `ci` runs the same examples every time, `nightly` runs new ones.

Choose one by HYPOTHESIS_PROFILE or ``pytest --hypothesis-profile``; `ci` is the default.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from platformdirs import user_cache_path

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    derandomize=False,
    deadline=None,
    database=DirectoryBasedExampleDatabase(user_cache_path("vapama") / "tests"),
    max_examples=2_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
