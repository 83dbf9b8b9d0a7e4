"""What every Python ships about itself, as one flat list of described things: the language's help topics, and the
docstrings of the standard library's modules, functions, classes and methods.

Run as a program, this file prints that list as JSON; it imports nothing but the standard library. `embedded` runs it
so, in a fresh isolated interpreter, because libraries such as torch and transformers put functions of their own into
the standard library's modules, and because reading some two hundred modules would otherwise import them into the
training process.

Only what importing a module gives is read (`__dict__`, docstrings, signatures): nothing of the library is called. The
modules are named one by one, so that none with a side effect (this, antigravity, idlelib, turtle, ...) or bound to one
platform is imported.
"""

import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

# One that this Python does not have (removed, or left out of the build) is passed over: the data are this Python's own.
MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg
csv dataclasses datetime decimal difflib dis doctest email email.charset email.contentmanager email.encoders
email.errors email.generator email.header email.headerregistry email.iterators email.message email.mime.audio
email.mime.base email.mime.image email.mime.multipart email.mime.text email.parser email.policy email.utils enum errno
faulthandler filecmp fileinput fnmatch fractions ftplib functools gc genericpath getopt getpass gettext glob graphlib
gzip hashlib heapq hmac html html.entities html.parser http http.client http.cookiejar http.cookies http.server
imaplib importlib importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util inspect io
ipaddress itertools json keyword linecache locale logging logging.config logging.handlers lzma mailbox marshal math
mimetypes mmap modulefinder multiprocessing.connection multiprocessing.managers multiprocessing.pool
multiprocessing.queues multiprocessing.shared_memory netrc numbers operator optparse os pathlib pdb pickle pickletools
pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random re
reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl
stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap
threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata unittest
unittest.mock urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid venv warnings wave
weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom
xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
""".split()

MIN_CHARACTERS, MAX_CHARACTERS = 24, 480
MAX_SIGNATURE = 140


@dataclass(frozen=True)
class Entry:
    """One thing that Python's documentation describes.

    name: as one would write it in code ("textwrap.dedent"), or a help topic's title. kind: "module", "function",
    "class", "method" or "topic". group: the top-level module or the topic; what the held-out split keeps together.
    signature: the call, or None where Python does not know it or it is long. description: prose, MIN_CHARACTERS to
    MAX_CHARACTERS long. members: a module's or class's public functions or methods, by name.
    """

    name: str
    kind: str
    group: str
    signature: str | None
    description: str
    members: tuple[str, ...] = ()


def entries() -> list[Entry]:
    """All described things of this Python, in the order of their sources; each description once.

    A module or the help topics that this Python lacks are passed over.
    """
    found = [*_from_modules(), *_from_topics()]
    first_of_its_text = {fingerprint(entry.description): entry for entry in reversed(found)}
    return [entry for entry in found if first_of_its_text[fingerprint(entry.description)] is entry]


def fingerprint(text: str) -> str:
    """Equal for texts that differ only in case, spacing and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _from_modules() -> Iterator[Entry]:
    for name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
        yield from _from_module(module, {"posixpath": "os.path", "genericpath": "os.path"}.get(name, name))


def _from_module(module: types.ModuleType, shown: str) -> Iterator[Entry]:
    """The module itself, then its public functions and classes, each class followed by its methods."""
    group = shown.split(".")[0]
    prefix = "" if shown == "builtins" else f"{shown}."
    functions: list[str] = []
    inner: list[Entry] = []
    for name, member in sorted(_public(module)):
        if inspect.isclass(member):
            methods = list(_methods(member, f"{prefix}{name}", group))
            method_names = tuple(entry.name.rsplit(".", 1)[1] for entry in methods)
            inner += _described(f"{prefix}{name}", "class", group, member, method_names)
            inner += methods
        elif inspect.isroutine(member):
            functions.append(name)
            inner += _described(f"{prefix}{name}", "function", group, member)
    yield from _described(shown, "module", group, module, tuple(functions))
    yield from inner


def _public(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """What a module offers: the names in its __all__, or else what is defined in it; no underscore in front."""
    listed = set(getattr(module, "__all__", ()))
    for name, member in vars(module).items():
        own = name in listed if listed else getattr(member, "__module__", None) == module.__name__
        if own and not name.startswith("_"):
            yield name, member


def _methods(owner: type, shown: str, group: str) -> Iterator[Entry]:
    """A class's own public methods that have a docstring of their own."""
    for name, member in sorted(vars(owner).items()):
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and inspect.isroutine(function):
            yield from _described(f"{shown}.{name}", "method", group, function)


def _described(name: str, kind: str, group: str, thing: object, members: tuple[str, ...] = ()) -> Iterator[Entry]:
    """One Entry if the thing's own docstring starts with usable prose, else nothing."""
    text = thing.__doc__
    description = prose(inspect.cleandoc(text)) if isinstance(text, str) else None
    if description is not None:
        signature = None if kind == "module" else _signature(thing, name)
        yield Entry(name, kind, group, signature, description, members)


def _signature(thing: object, name: str) -> str | None:
    """The call as text; None if unknown, long, or holding a value that is written differently in every process."""
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 (inspect evaluates the defaults in a C function's signature: it may raise anything)
        return None
    text = re.sub(r"^\((self|cls|\$self)(, /)?(, )?", "(", text)
    if len(text) > MAX_SIGNATURE or re.search(r"<|\{.|['\"]/\w", text):
        return None
    return name + text


# What ends the prose: an indented line, an example, a list, a table, a grammar rule, a definition `name(arguments)`.
_NOT_PROSE = re.compile(r"\s|>>>|XXX|\(\w+, .*\) = |[-*+|=~#:.@]|\d+\.|\w+\s*(::=|--|\s-\s)|(class )?[\w.]+\(.*\)$|\w+\.\w+$")
_SIGNATURE = re.compile(r"[\w.]+\(.*?\)\s*(->.*)?$")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def prose(text: str) -> str | None:
    """A documentation text's leading paragraphs of prose, each on one line, up to MAX_CHARACTERS; None if unusable.

    A signature line in front is dropped, and so is a last sentence that only announces what follows the prose
    ("Syntax:").
    """
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.split("\n")
        if not kept and _SIGNATURE.match(lines[0]):
            lines = lines[1:]
        if any(_NOT_PROSE.match(line) for line in lines):
            break
        if any(lines) and not re.match(r"(New|Changed|Deprecated) (in|since) version", lines[0]):
            kept.append(_on_one_line(lines))
    if kept and kept[-1].endswith(":"):
        sentences = _SENTENCE_END.split(kept.pop())
        kept += [" ".join(sentences[:-1])] if len(sentences) > 1 else [] if kept else sentences
    flowing = _cut("\n\n".join(_ended(paragraph) for paragraph in kept))
    usable = len(flowing) >= MIN_CHARACTERS and flowing.isascii() and re.match(r"[A-Z\"'`]", flowing) and " " in flowing
    return flowing if usable else None


def _on_one_line(lines: list[str]) -> str:
    """A paragraph without its line breaks and without reStructuredText's marks: :func:`x` and ``x`` become `x`."""
    text = re.sub(r"(?<=\w-)\n(?=\w)", "", "\n".join(line.strip() for line in lines))
    return re.sub(r":[a-z:]+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`").replace("::", ":")


def _ended(paragraph: str) -> str:
    """With a full stop where the end of a sentence is missing."""
    return paragraph if paragraph.endswith((*".!?", ".)", '."', ".'")) else paragraph.rstrip(":,; ") + "."


def _cut(text: str) -> str:
    """At most MAX_CHARACTERS, ending with a sentence; empty if the first sentence is already too long."""
    if len(text) <= MAX_CHARACTERS:
        return text
    ends = [match.start() for match in _SENTENCE_END.finditer(text)]
    return text[: max((end for end in ends if end <= MAX_CHARACTERS), default=0)]


def _from_topics() -> Iterator[Entry]:
    """Every titled section of the language's help topics (what `help("assert")` shows)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for key, text in sorted(topics.items()):
        headings = list(re.finditer(r"^(\S.{2,60})\n([*=\-~^])\2{2,}$", text, flags=re.MULTILINE))
        for heading, following in zip(headings, [*headings[1:], None], strict=True):
            body = text[heading.end() : following.start() if following else None]
            without_grammar = re.sub(r"\A(\s*\n( .*|[^ \n].*:)?)+(?=\n\n)", "", body)
            description = prose(re.sub(r'"([^"\n]{1,60})"', r"`\1`", without_grammar))
            if description is not None:
                title = heading[1].replace('"', "`").replace("\u2014", "-")
                yield Entry(title, "topic", f"topic {key}", None, description)


if __name__ == "__main__":
    json.dump([asdict(entry) for entry in entries()], sys.stdout)
