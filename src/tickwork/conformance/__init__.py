"""What a Tinker-compatible server really does, found out through the official SDK.

Each probe asks for something, looks at its effect, and says which of these it was:

``PASS``      done as documented
``REFUSED``   not offered, and said so
``IGNORED``   accepted and without effect
``WRONG``     done otherwise than documented
``BROKEN``    an error that is no refusal, or no answer
``SKIPPED``   could not be asked here
"""

from tickwork.conformance.probe import BAD, Finding, Verdict
from tickwork.conformance.runner import probes, run

__all__ = ["BAD", "Finding", "Verdict", "probes", "run"]
