"""The error that a user can mend, the end by SIGTERM, and errors of others told in one line."""

import re

_LENGTH = 300  # of what others say, in characters
# What TensorFlow says around its message: where in its graph, and where in which code.
_PLACES = re.compile(
    r"Graph execution error:|Detected at node .*|<stack traces unavailable>|^\s+File \".*\n.*"
    r"|\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*|.* root error\(s\) found\.|^\s*\(\d\)\s*\w+:"
    r"|\d+ successful operations\.|\d+ derived errors ignored\."
    r"|Error in user-defined function passed to .*? transformation with iterator: [\w:]+: ",
    re.MULTILINE,
)


class UserError(ValueError):
    """What was given cannot be used. The message is one line that says what and the mend."""


class NoSplit(UserError):
    """A data set has not the split that was asked for."""


class Preempted(BaseException):
    """SIGTERM ends the run. Like an interrupt it is no error, which others would catch."""


def one_line(text):
    """What somebody says, such as an exception, in one line of bearable length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= _LENGTH else line[:_LENGTH] + "..."


def _asserted(match):
    return " ".join(re.findall(r"\[(.*?)\]", match[1]))


def reason(error):
    """What an exception says in one line, without where in TensorFlow it says it."""
    message = _PLACES.sub("", str(getattr(error, "message", error)))
    message = re.sub(r".*Summarized data: b'(.*?)'", r"\1", message, flags=re.DOTALL)
    message = re.sub(r"assertion failed: ((?:\[.*?\] ?)+)", _asserted, message)
    return one_line(message) or type(error).__name__
