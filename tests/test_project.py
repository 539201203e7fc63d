"""The house: what a reader must carry, where a first reader can stop, imports, and a README that is true."""
import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from functools import cache

import pytest
from conftest import REPO, run

FILES = ("model.py", "data.py", "eval.py", "train.py")          # each imports from those before it
PACKAGES = {"torch", "numpy", "einops", "av", "sentencepiece", "safetensors"}
README = (REPO / "README.md").read_text()
PAGES = ("README.md", "tests/README.md", "tests/LEDGER.md", "tests/study/README.md", "tests/WALK.md", "tests/study/TRIED.md")
STOP = "# ===== a first reader can stop here ====="
STORY = {"model.py": 820, "data.py": 730, "train.py": 780, "eval.py": 540}      # lines above the stop line, at most
STORIES, STORIES_CONTENT = 2870, 11_000
ALL = 37_600                                                    # the design wants 36,000; mends of faults came in
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def nesting(node, depth=0):
    """The deepest block of a function; an elif is no deeper than its if."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            elif_ = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not elif_)))
    return deepest


@cache
def facts(name):
    """What a reader of a file must carry: lines of the story, expressions in it and in all, expressions per code line, lines that
    are only a comment per 100 code lines, the share of code lines over 90 columns in per cent, the longest line and function (kernels
    aside), the deepest nesting."""
    source = (REPO / name).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    nodes, docstrings, comments = list(ast.walk(tree)), set(), set()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not lines[token.start[0] - 1][:token.start[1]].strip():
            comments.add(token.start[0])
    code = [i for i, line in enumerate(lines, 1) if line.strip() and i not in docstrings | comments]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name != "triton_kernels"]
    content = sum(isinstance(node, ast.expr) for node in nodes)
    stop = lines.index(STOP) + 1
    story = sum(isinstance(node, ast.expr) and node.lineno < stop for node in nodes)
    return dict(story=stop, story_content=story, content=content, per_line=content / len(code), comments=100 * len(comments) / len(code),
                wide=100 * sum(len(lines[i - 1]) > 90 for i in code) / len(code), longest_line=max(map(len, lines)),
                longest=max(n.end_lineno - n.lineno + 1 for n in functions), nesting=max(map(nesting, functions)))


@pytest.mark.upstream
@pytest.mark.parametrize("name", FILES)
def test_a_file_asks_no_more_of_its_reader(name):
    """The figures that ../shared/design.md holds: no figure is worth a worse sentence, where one bites something should go."""
    found = facts(name)
    assert found["story"] <= STORY[name], found
    assert round(found["per_line"], 1) <= (6.5 if name == "model.py" else 6.0), found
    assert round(found["comments"], 1) >= 8 and found["wide"] <= 12 and found["longest_line"] <= 120, found
    assert found["longest"] <= 60 and found["nesting"] <= 4, found


@pytest.mark.upstream
def test_a_first_reader_knows_where_to_stop():
    """Each file tells its story, says once that a first reader can stop, and only then keeps house, in rooms with letters."""
    for name in FILES:
        lines = (REPO / name).read_text().splitlines()
        assert [line for line in lines if "first reader can stop" in line] == [STOP], name
        banners = [(i, found[1]) for i, line in enumerate(lines) if (found := re.match(r"# -{10,} (\w+) ", line))]
        numbers = [room for i, room in banners if i < lines.index(STOP)]
        letters = [room for i, room in banners if i > lines.index(STOP) and len(room) == 1]
        assert numbers == [str(n + 1) for n in range(len(numbers))] and letters == sorted(letters) and letters[0] == "A", name
    assert sum(facts(name)["story"] for name in FILES) <= STORIES
    assert sum(facts(name)["story_content"] for name in FILES) <= STORIES_CONTENT


@pytest.mark.upstream
def test_readme_names_the_rooms_of_the_stories():
    """In "Read it in this order" each file's rooms are its banners, and the lines are counted, not typed."""
    text = " ".join(README.split("## Read it in this order")[1].split("\n## ")[0].split())
    total = 0
    for name in FILES:
        lines = (REPO / name).read_text().splitlines()
        stop = lines.index(STOP)
        total += stop + 1
        rooms = [found[1] for line in lines[:stop] if (found := re.match(r"# -{10,} \d+ (.*)", line))]
        assert re.search(rf"- `{name}`, [^?]+\? {re.escape(', '.join(rooms))}( -|$)", text), f"README's rooms of {name}: {', '.join(rooms)}"
    said, = re.findall(r"([\d,]+) lines", text)
    assert abs(int(said.replace(",", "")) - total) <= 10, total


@pytest.mark.upstream
def test_the_house_is_small():
    assert sum(facts(name)["content"] for name in FILES) <= ALL


@pytest.mark.upstream
def test_train_takes_little_from_the_other_files():
    tree = ast.parse((REPO / "train.py").read_text())
    names = {node.module: len(node.names) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names["eval"] <= 2 and names["data"] <= 12 and names["model"] <= 16


def test_no_file_changes_another_and_importing_changes_nothing():
    """Nobody assigns to a name of a sister file; no file starts another; an import leaves no handler, thread or exit hook."""
    for name in FILES:
        tree = ast.parse((REPO / name).read_text())
        sisters = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                   for alias in node.names if f"{alias.name}.py" in FILES}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                assert not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in sisters), name
            assert not (isinstance(node, ast.Attribute) and node.attr.startswith("exec")), f"{name} starts a program"
    code = ("import atexit, json, multiprocessing.util as util, signal, threading, torch\n"
            "def state():\n"
            "    handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]\n"
            "    return handlers, threading.active_count(), atexit._ncallbacks(), len(util._finalizer_registry), torch.get_num_threads()\n"
            "import av, sentencepiece, torch.distributed.fsdp, torch.utils.data, numpy, einops, safetensors.torch\n"
            "before = state()\n"
            "import model, data, eval, train\n"
            "print(json.dumps([before, state()]))")
    before, after = json.loads(run("-c", code, env={"PYTHONPATH": str(REPO)})[1])
    assert before == after


def test_imports_go_one_way_and_only_the_six_packages_run():
    order = [name.removesuffix(".py") for name in FILES]        # model <- data <- eval <- train
    for i, name in enumerate(order):
        tree = ast.parse((REPO / f"{name}.py").read_text())
        if name == "model":                                     # triton comes with torch, and may be missing
            kernels = next(node for node in tree.body if getattr(node, "name", "") == "triton_kernels")
            tree.body.remove(kernels)
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert roots - set(sys.stdlib_module_names) <= PACKAGES | set(order[:i]), name
    pins = re.findall(r"^([a-z]+)", (REPO / "requirements.txt").read_text(), re.M)
    assert set(pins) == PACKAGES


@pytest.mark.upstream
def test_top_level_is_the_card():
    names = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in names}
    assert top <= {*FILES, "tests", "README.md", "requirements.txt", "requirements-dev.txt", "LICENSE", ".gitignore", ".ci"}


def test_the_pages_point_at_code_that_exists():
    """README and the ledger, which has a row for every point of the paper."""
    rows = [(page, *row) for page in PAGES for row in re.findall(r"`(\w+\.py): ([\w.]+)`", (REPO / page).read_text())]
    assert sum(page == "README.md" for page, *_ in rows) >= 12 and sum(page == "tests/LEDGER.md" for page, *_ in rows) >= 55
    for page, file, symbol in rows:
        scope = ast.parse((REPO / file).read_text()).body
        for part in symbol.split("."):
            found = [n for n in scope if getattr(n, "name", None) == part
                     or isinstance(n, ast.Assign) and any(getattr(t, "id", None) == part for t in n.targets)
                     or isinstance(n, ast.AnnAssign) and getattr(n.target, "id", None) == part]
            assert found, f"{page} names `{file}: {symbol}`, which does not exist"
            scope = getattr(found[0], "body", [])


@pytest.mark.upstream
def test_readme_is_read_to_its_end():
    assert len(README.splitlines()) <= 230 and len(README.encode()) <= 14_000 and len(README.split()) <= 2600
    long = [line for line in README.splitlines() if len(line) > 100]
    assert not long, long


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    """Files and pictures are in the repository, and headings are on the page that a link names."""
    text = (REPO / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    for link in links:
        target = (REPO / page).parent / link.partition("#")[0]
        assert target.resolve().relative_to(REPO.resolve()).as_posix() in tracked, f"{page}: {link}"


@pytest.mark.upstream
def test_every_number_of_readmes_tables_is_measured():
    """What has a decimal point in a table of README stands in the study's page, which report.py makes of the recorded cells, or in
    tests/README.md beside the command that prints it."""
    measured = "".join((REPO / page).read_text() for page in PAGES[1:4])
    tables = [line for line in README.splitlines() if line.startswith("|")]
    numbers = {number for line in tables for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", line)}
    assert len(numbers) >= 25
    known = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", measured))
    assert numbers <= known, numbers - known


def test_readme_commands_run(toy, tmp_path):
    """The commands of README's blocks, in order, on a shortened schedule."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy").symlink_to(toy / "toy")
    shutil.copytree(toy / "stage0", tmp_path / "out" / "stage0")
    ran = 0
    for line in lines:
        for command in line.split(" && "):
            words = command.split()
            if not words or words[0] not in ("torchrun", "python") or "DIR" in words or "7b" in words:
                continue
            if words[0] == "torchrun":
                start = next(i for i, w in enumerate(words) if w.endswith(".py"))
                words = ["-m", "torch.distributed.run", *words[1:start], str(REPO / words[start]), *words[start + 1:]]
                words += ["--steps", "2"]
            else:
                words = [str(REPO / words[1]), *words[2:]]
            words = [str(toy / "toy/instruct.jsonl") if w in ("your.jsonl", "held-out.jsonl") else w for w in words]
            run(*shlex.split(" ".join(words)), cwd=tmp_path)
            ran += 1
    assert ran >= 5


def test_six_lines_of_python(toy):
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    code = block.replace('"out/stage3"', repr(str(toy / "stage3"))).replace('"out/toy/test/ego/0.mp4"', repr(str(toy / "toy/val/ego/0.mp4")))
    assert code.count(str(toy)) == 3
    _, out, _ = run("-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}")
    assert out.strip()
