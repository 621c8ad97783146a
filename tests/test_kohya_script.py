"""trainer.kohya.script: commands in scripts of several shells."""

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.kohya.script import words_of

COMMANDS = {  # a file's name -> its text
    "set.bat": r"""
        REM python train_network.py --old
        set DIM=8
        set "DATA=C:\a b"
        set N="cat"
        set NAME="%N%_%dim%"
        py "%HERE%\train_network.py" ^
          --dim=%DIM% --data="%DATA%\d" --name=%NAME%^
          --seed="3" --end="|||"^
          %*
        echo done
    """,
    "set.ps1": r"""
        $dim = 8 # ranks
        $root = "C:\a b"
        $data = "$root\d"
        & $python `
          "$here\train_network.py" `
          --dim=$dim --data="$data" `
          # --seed=1 `
          --name="cat_${dim}" --seed=3 --end="|||" $args > log; echo done
    """,
    "set.sh": r"""
        DATA="${DATA_OF_NOBODY:-C:\a b\d}"
        export DIM=8 # don't
        FLAGS="--seed=3 --end=|||"
        pip install x.py --a
        # python train_network.py --old
        [ -f train_network.py ] || exit 1
        NONE=  # it isn't set
        $PY -m accelerate.commands.launch "$HERE/train_network.py" \
          --dim=$DIM --data="$DATA" --name=cat_${DIM} \
          # --seed 1 \
          $NONE $FLAGS "$@" 2>&1 | tee "$LOG" || fail
    """,
    "array.sh": r"""
        DATA='C:\a b\d'
        ARGS=(
          --dim=8  # ranks
          --data="$DATA"
          # --seed=1
          --name=cat_8
        )
        ARGS+=(--seed=3)
        nohup python train_network.py "${ARGS[@]}" --end='|||'; echo done
    """,
}


def lines_of(text):
    return "\n".join(line.removeprefix(" " * 8) for line in text.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_variables_of_a_script_are_put_in(name, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    words, commands = words_of(Path(name), lines_of(COMMANDS[name]))
    assert commands == 1
    assert words == [
        *("train_network.py", "--dim=8", "--data=C:\\a b\\d", "--name=cat_8"),
        *("--seed=3", "--end=|||"),
    ]


def test_variables_of_the_environment_are_put_in_where_a_script_has_none(monkeypatch):
    monkeypatch.setenv("DIM", "4")
    monkeypatch.setenv("SEED", "5")
    words, _ = words_of(Path("a.sh"), "SEED=3\npython train_network.py --dim $DIM --seed $SEED")
    assert words[1:] == ["--dim", "4", "--seed", "3"]


UNKNOWN = [  # (a file's name, its text, what of it is not known)
    ("a.sh", 'python fine_tune.py --seed "$SEED_OF_NOBODY"', "$SEED_OF_NOBODY"),
    ("a.sh", 'S=1\n[ "$1" ] && S=2\npython fine_tune.py --seed $S', "$S"),
    ("a.sh", "S=1\nif x; then\n  S=2\nfi\npython fine_tune.py --seed $S", "$S"),
    ("a.sh", "S=$(date)\npython fine_tune.py --seed $S", "$S"),
    ("a.sh", "A=()\nif x; then\n  A+=(--b)\nfi\npython fine_tune.py ${A[@]}", "${A[@]}"),
    ("a.sh", "python fine_tune.py --seed ${1:?a seed}", "${1:?a seed}"),
    ("a.sh", 'accelerate launch "$SCRIPT_OF_NOBODY" --seed 1', "$SCRIPT_OF_NOBODY"),
    ("a.bat", "set S=\nif x==1 set S=--flip_aug\npython fine_tune.py %S% --seed 1", "%S%"),
    ("a.bat", "python fine_tune.py --seed %~1", "%~1"),
    ("a.ps1", "$s = if ($x) { 1 } else { 2 }\npython fine_tune.py --seed $s", "$s"),
    ("a.ps1", "$a = @('--seed', '1')\npython fine_tune.py @a", "@a"),
]


@pytest.mark.parametrize(("name", "text", "unknown"), UNKNOWN, ids=[row[1][:40] for row in UNKNOWN])
def test_what_depends_on_running_a_script_is_named(name, text, unknown):
    with pytest.raises(UserError) as error:
        words_of(Path(name), text)
    assert f"{unknown} is not known without running it; give the command" in str(error.value)
