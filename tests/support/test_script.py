"""How a script speaks: errors in one line, what a terminal cannot show, an output that nobody reads, Ctrl-C at any time."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import support
import train
from data import prompting
from support import resume, script
from tests.tiny import one_line, tiny_metadata, tiny_tensors, write_gguf
from weights.files import printable
from weights.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = [["train.py"], ["eval.py"], *(["-m", f"tools.{name}"] for name in ("export", "compare", "bench", "draw", "plot", "spectra", "study", "page",
                                                                              "where"))]


def test_what_cannot_be_encoded_is_spelled_out(monkeypatch):
    """An output in ASCII or Latin-1, a name that is no text: the run goes on."""
    for encoding, shown in (("ascii", b"caf\\xe9 \\u2192 \\U0001f642 \\udce9\n"), ("latin-1", b"caf\xe9 \\u2192 \\U0001f642 \\udce9\n"),
                            ("utf-8", "café → 🙂 \\udce9\n".encode())):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        script.run_script(lambda: print("café → 🙂 \udce9"))
        assert raw.getvalue() == shown


def test_text_from_files_is_printable_text():
    """Escapes of a terminal, a text that runs backwards, an empty width: spelled out. Letters of all kinds stay."""
    assert printable("a\x1b[2J\r\x07\x9b31m\u202e\u200b\ud800") == r"a\x1b[2J\r\x07\x9b31m\u202e\u200b\ud800"
    assert printable("Größe → 数 🙂\n\t£") == "Größe → 数 🙂\n\t£"
    assert script.one_line("a\nb\x85c\u2028d\x1b") == r"a b c d\x1b"


HOSTILE = "\x1b[31m\u202e\x07"


def test_nothing_that_is_shown_of_a_file_controls_a_terminal(tiny_gguf, half, tmp_path, capsys):
    """Names of files, questions and answers, what the model answers, subjects and levels, flags in a checkpoint, names in a
    model file: in plan, samples, dry run, progress, tables and messages."""
    model, data = (tmp_path / f"{name}{HOSTILE}" for name in ("model", "data"))
    model = shutil.copy(tiny_gguf, f"{model}.gguf")
    data.mkdir()
    problem = {"question": f"What is {HOSTILE}?", "answer": f"{HOSTILE} two\n#### 2", "problem": HOSTILE + "1+1?", "type": HOSTILE + "\nx",
               "level": HOSTILE}
    for name in ("train", "test", "math"):
        (data / f"{name}.jsonl").write_text("\n".join([json.dumps({**problem, "answer": "2"} if name == "math" else problem)] * 12))
    common = ["--model", str(model), "--device", "cpu"]
    train.main([*common, "--method", "lora", "--data", str(data), "--held-out", "4", "--steps", "1", "--out", str(tmp_path / "r")])
    train.main([*common, "--method", "lora", "--data", str(data), "--held-out", "4", "--dry-run"])
    evaluation.main([*common, "--data", str(data / "math.jsonl"), "--benchmark", "math", "--limit", "2", "--max-new", "2", "--out",
                     str(tmp_path / "out")])
    evaluation.main([*common, "--data", str(data / "train.jsonl"), "--limit", "2", "--benchmark", "loss", "--out", str(tmp_path / "out")])
    evaluation.main([*common, "--ask", HOSTILE, "--max-new", "2"])

    tensors, metadata = read_safetensors(half / resume.FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fields = json.loads(metadata["run"])
    for flag in (f"--{HOSTILE}=1", f"--data={HOSTILE}", f"--model={HOSTILE}", f"--template={HOSTILE}"):
        (tmp_path / "half").mkdir(exist_ok=True)
        write_safetensors(tmp_path / "half" / resume.FILE, tensors,
                          {**metadata, "run": json.dumps({**fields, "flags": [*fields["flags"], flag]})})
        with pytest.raises(SystemExit):
            script.run_script(lambda: train.main(["--resume", str(tmp_path / "half")]))
    write_gguf(tmp_path / "odd.gguf", tiny_metadata(), {**tiny_tensors(), HOSTILE: tiny_tensors()["output_norm.weight"]})
    with pytest.raises(SystemExit):
        script.run_script(lambda: train.main(["--model", str(tmp_path / "odd.gguf"), "--data", str(data)]))
    said = capsys.readouterr()
    assert all(letter.isprintable() or letter in "\n\t" for letter in said.out + said.err)
    assert said.err.count("\n") == 5 and r"What is \x1b[31m\u202e\x07?" in said.out and r"subject \x1b[31m\u202e\x07 x" in said.out


# ---- nobody reads ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flush", [True, False])
def test_an_output_that_nobody_reads_ends_in_a_hint(flush, monkeypatch, capsys):
    """As in `train.py | head`: how to go on, whether the line is written at once or as the script ends."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    with pytest.raises(SystemExit) as stopped:
        script.run_script(lambda: print("x", flush=flush), go_on="a run goes on with --resume RUN")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: nobody reads the output any more; a run goes on with --resume RUN\n"


def test_python_adds_nothing_to_a_broken_pipe(tiny_gguf, tmp_path):
    """train.py itself: one line with --resume, status 2."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run([sys.executable, ROOT / "train.py", "--model", tiny_gguf, "--data", "practice", "--out", tmp_path / "r"],
                              stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == ("error: nobody reads the output any more; a run that has saved a checkpoint "
                                                    "goes on with --resume RUN\n")


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def importing(tmp_path):
    """A function that runs a script with a torch that is interrupted as it is imported, and then asks for status 7."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nraise SystemExit(7)\n")

    def run(command, before=signal.default_int_handler):
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)}, preexec_fn=lambda: signal.signal(signal.SIGINT, before))
    return run


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command[-1])
def test_ctrl_c_while_torch_is_imported_is_one_line(command, importing):
    """With the status that Ctrl-C has later."""
    done = importing(command, signal.SIG_DFL)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored_while_importing(importing):
    """As for a script's job in the background."""
    assert importing(SCRIPTS[0], signal.SIG_IGN).returncode == 7


def test_the_script_listens_again_once_it_runs(monkeypatch, capsys):
    """What is open is closed: a KeyboardInterrupt again. Imported by others, the modules leave Ctrl-C alone."""
    before, closed = signal.getsignal(signal.SIGINT), []
    support.interruptible("train")
    assert signal.getsignal(signal.SIGINT) == before

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            closed.append(True)
    signal.signal(signal.SIGINT, support.interrupted)
    try:
        with pytest.raises(SystemExit) as stopped:
            script.run_script(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and closed and capsys.readouterr().err == "error: interrupted\n"


# ---- a prompt of no tokens ------------------------------------------------------------------------------------------

def test_a_tokenizer_that_knows_no_part_of_the_prompt_is_refused():
    """Instead of a model that is asked nothing."""
    class Nothing:
        eos_id = 0

        def encode(self, text, start=True):
            return []

    for call in (lambda: prompting.encode(Nothing(), {"question": "Why?", "answer": "So."}),
                 lambda: prompting.encode_prompt(Nothing(), "Question: Why?")):
        with pytest.raises(ValueError, match="tokenizer has no token for any part of the prompt 'Question: Why?") as error:
            call()
        assert one_line(error)


# ---- what a parser says of itself -----------------------------------------------------------------------------------

@pytest.mark.parametrize("described", ["Does this.\n\nAnd more.", "Does this.", None])
def test_help_has_the_first_line_alone(described):
    """Of a docstring, which python -OO leaves out."""
    text = script.Parser(prog="it", description=described).format_help()
    assert ("Does this." in text) == bool(described) and "And more" not in text
