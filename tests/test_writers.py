"""Nothing opens a file for writing but fairseq_moe_ext/atomic_file.py, and what is exempt here, read off the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRITER = "fairseq_moe_ext/atomic_file.py"
FOLDERS = ("fairseq_moe_ext", "scripts", "examples")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
# what writes a file or gives it its name, by a path; as methods, too
BY_PATH = {
    "write_text", "write_bytes", "rename", "renames", "link", "symlink", "symlink_to", "hardlink_to", "link_to",
    "mkstemp", "NamedTemporaryFile", "copyfile", "copy", "copy2", "copytree", "move", "touch", "truncate",
    "tofile", "to_csv", "to_json", "save_model", "sendfile",
}  # fmt: skip
MODULES = {"os", "shutil", "tempfile", "Path", "path", "pathlib"}  # of those that other things have, too
AMBIGUOUS = {"copy", "move", "link", "replace", "rename", "open", "truncate"}
# what writes to a path or to an open file; given an open one of `new_file` it is the helper's
TO_FILE = {"savefig", "save", "savez", "savez_compressed", "savetxt", "save_file", "dump", "imsave"}
OPENERS = {"open", "fdopen", "ZipFile", "FileIO", "memmap", "TarFile"}
# (file, what): a file that is resumed, under its lock; streams of processes; folders
EXEMPT = {
    ("fairseq_moe_ext/tasks/serving_parser.py", "open"),  # /dev/null as standard output
    ("fairseq_moe_ext/checkpoints/conversion_lock.py", "open"),
    ("fairseq_moe_ext/checkpoints/partial_file.py", "open"),
    ("fairseq_moe_ext/checkpoints/record_writer.py", "save"),
    ("fairseq_moe_ext/nllb/export.py", "rename"),
    ("scripts/benchmarks/measure_quantizing.py", "open"),  # a file of nothing, to time the disk
    ("scripts/benchmarks/benchmark_server.py", "open"),  # a child process's log
    ("scripts/benchmarks/peers/ctranslate2_layers.py", "save"),  # into a folder that is temporary
    ("scripts/benchmarks/peers/process.py", "open"),
    ("scripts/benchmarks/peers/translation.py", "open"),
    ("scripts/benchmarks/peers/serve.py", "fdopen"),  # standard output
    ("scripts/benchmarks/peers/environments.py", "rename"),  # folders
    ("scripts/benchmarks/peers/translation_model.py", "rename"),
}


def name_of(function: ast.expr) -> tuple[str, str]:
    """(what it is an attribute of, its name)."""
    if isinstance(function, ast.Attribute):
        return ast.unparse(function.value), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def opened_by_the_helper(tree: ast.AST) -> set[str]:
    """Names of `with new_file(...) as name`, of `name = stack.enter_context(new_file(...))`, and of files in memory."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            if name_of(node.context_expr.func)[1] == "new_file" and isinstance(node.optional_vars, ast.Name):
                found.add(node.optional_vars.id)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            calls = [node.value, *(value for value in node.value.args if isinstance(value, ast.Call))]
            if {name_of(call.func)[1] for call in calls} & {"BytesIO", "StringIO", "new_file"}:
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def opens_for_writing(call: ast.Call) -> bool:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    constants = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    modes = [text for text in constants if text and set(text) <= set("rwaxbt+")]
    flags = {flag for value in values for flag in re.findall(r"\bO_\w+", ast.unparse(value))}
    return any(set(mode) & set("wax+") for mode in modes) or bool(flags - {"O_RDONLY", "O_CLOEXEC"})


def writes(source: str) -> list[tuple[int, str]]:
    """(line, what) of every call that writes a file without the helper."""
    tree = ast.parse(source)
    helpers = opened_by_the_helper(tree)
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        owner, name = name_of(call.func)
        given = {argument.id for argument in call.args if isinstance(argument, ast.Name)}
        given |= {argument.value.id for argument in call.args
                  if isinstance(argument, ast.Attribute) and isinstance(argument.value, ast.Name)}  # fmt: skip
        if name in BY_PATH and owner and (name not in AMBIGUOUS or owner.split(".")[-1] in MODULES):
            found.append((call.lineno, name))
        elif name in ("replace", "rename") and (owner == "os" or len(call.args) == 1 and not call.keywords):
            found.append((call.lineno, name))
        elif name in TO_FILE and owner != "plots" and call.args and not given & helpers and owner:
            found.append((call.lineno, name))
        elif name == "save_file" and not given & helpers:
            found.append((call.lineno, name))
        elif name in OPENERS and opens_for_writing(call):
            found.append((call.lineno, name))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "open(file, 'w')", "open(file, mode='ab')", "open(file, 'r+b')", "path.open('x')", "path.write_text(text)",
        "os.open(file, os.O_WRONLY)", "os.replace(a, b)", "partial.rename(target)", "partial.replace(target)",
        "shutil.copyfile(a, b)", "shutil.copy(a, b)", "torch.save(state, path)", "np.savez(path, a=a)",
        "figure.savefig(path)", "save_file(tensors, path)", "json.dump(content, file)", "words.save(str(path))",
        "zipfile.ZipFile(file, 'w')", "os.fdopen(1, 'w')",
    ],
)  # fmt: skip
def test_a_writer_is_found(code):
    assert [line for line, _ in writes(code)] == [1]


@pytest.mark.parametrize(
    "code",
    [
        "open(file, 'rb')", "os.open(file, os.O_RDONLY | os.O_CLOEXEC)",
        "name.replace('_', '-')", "write_text(path, text)", "copy.copy(args)", "path.read_text()",
        "with new_file(path) as file: torch.save(state, file)", "with new_file(path) as f: save_file(tensors, f.name)",
        "file = io.BytesIO(); np.savez(file, a=a)", "dataclasses.replace(layer, name=name)", "layer.copy()",
    ],
)  # fmt: skip
def test_what_reads_is_no_writer(code):
    assert writes(code) == []


def test_everything_is_written_by_the_helper():
    found = {
        (str(file.relative_to(ROOT)), line, what)
        for file in FILES
        for line, what in writes(file.read_text(encoding="utf-8"))
        if str(file.relative_to(ROOT)) != WRITER and (str(file.relative_to(ROOT)), what) not in EXEMPT
    }
    assert not found, "\n".join(map(str, sorted(found)))
