"""API keys: kept by their hash, revoked within seconds, limited by arithmetic."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT

from biggan import claim as claims
from biggan.claim import ClaimError, claimed
from biggan.errors import UserError
from serving import keys as keys_module
from serving import limits as limits_module
from serving.keys import (
    LEAST_BURST,
    STALE_SECONDS,
    Key,
    Keys,
    KeyStore,
    Limits,
)
from serving.limits import DAY, MINUTE, SECOND, Admission, Meter, Refusal
from serving.problems import ProblemError
from serving.schemas import GenerateRequest

NOON = int(datetime(2024, 2, 28, 12, tzinfo=UTC).timestamp()) * SECOND


class Clock:
    """A time that goes on when it is told to: seconds for `Keys`, nanoseconds for a `Meter`."""

    def __init__(self, now=0):
        self.now = now

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += int(seconds * SECOND)


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def store(root):
    return KeyStore(root)


def a_key(name="alice", **limits):
    return Key(name=name, sha256="", created="", **limits)


def refusal(keys, secret):
    with pytest.raises(ProblemError) as caught:
        keys.authenticate(secret)
    return caught.value


# What is stored


def test_the_secret_is_nowhere_in_the_store(root, store):
    secret = store.make("alice", Limits(quota=5, models=("digits",)))
    assert re.fullmatch(r"bg_[0-9a-f]{64}", secret)
    content = b"".join(file.read_bytes() for file in Path(root).rglob("*") if file.is_file())
    assert secret[3:].encode() not in content
    assert bytes.fromhex(secret[3:]) not in content
    assert hashlib.sha256(secret.encode()).hexdigest().encode() in content
    [key] = store.all()
    assert (key.name, key.rate, key.quota, key.models) == ("alice", 600, 5, ("digits",))
    assert abs(datetime.now(UTC) - datetime.fromisoformat(key.created)).total_seconds() < 60


def test_a_name_is_used_once(store):
    first = store.make("alice")
    with pytest.raises(UserError, match="there is a key 'alice' already"):
        store.make("alice")
    store.revoke("alice")
    with pytest.raises(UserError, match="there is a key 'alice' already"):
        store.make("alice")
    assert store.make("bob") != first
    with pytest.raises(UserError, match=r"no key 'alise' in .*; there is: alice, bob$"):
        store.revoke("alise")


@pytest.mark.parametrize("name", ["", "Alice", "a b", "-a", "a/b", "../a", "a.json", "é", "a" * 65])
def test_names_that_cannot_be(store, name):
    for act in (store.make, store.revoke):
        with pytest.raises(UserError, match=f"key name {name!r}: use at most 64 lower-case"):
            act(name)


@pytest.mark.parametrize(
    "limits", [{"rate": 0}, {"quota": 0}, {"models": ()}, {"models": ("digits@best",)}, {"x": 1}]
)
def test_limits_that_cannot_be(store, limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)
    store.make("alice")
    with pytest.raises(UserError, match=next(iter(limits))):
        store.change("alice", limits)
    assert KeyStore(store.folder.parent.uri).all() == store.all()


def test_a_change_leaves_the_other_limits(store):
    store.make("alice", Limits(rate=7, quota=5, models=("digits",)))
    store.change("alice", {"quota": None})
    [key] = store.all()
    assert (key.rate, key.quota, key.models) == (7, None, ("digits",))


def test_no_change_of_limits_undoes_a_revocation(store):
    store.make("alice")

    class Meanwhile(UserDict):
        def keys(self):  # Read when the key has been read, and is about to be written.
            store.revoke("alice")
            return super().keys()

    store.change("alice", Meanwhile(rate=7))
    [key] = store.all()
    assert key.revoked
    assert key.rate == 7


def test_two_processes_make_keys_at_once(root, tmp_path, store):
    code = f"""
import sys, time
from pathlib import Path
from biggan.errors import UserError
from serving.keys import KeyStore
me, store = sys.argv[1], KeyStore({root!r})
Path({str(tmp_path)!r}, me).touch()
while not all(Path({str(tmp_path)!r}, name).exists() for name in "ab"):
    time.sleep(0.001)
for i in range(5):
    print(store.make(f"{{me}}{{i}}"))
    try:
        print(store.make(f"both{{i}}"))
    except UserError:
        pass
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, me], stdout=subprocess.PIPE, text=True)
        for me in "ab"
    ]
    secrets = [secret for process in both for secret in process.communicate()[0].split()]
    assert [process.returncode for process in both] == [0, 0]
    found = store.all()
    names = {f"{me}{i}" for me in ("a", "b", "both") for i in range(5)}
    assert {key.name for key in found} == names
    # Every secret that was shown is that of a key, of which each name has one.
    shown = {hashlib.sha256(secret.encode()).hexdigest() for secret in secrets}
    assert shown <= {key.sha256 for key in found}
    assert len(secrets) == len(shown) >= 10


def test_a_key_that_is_being_made_is_not_made_twice(store, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.2)
    with claimed(store.folder / "alice", "made"):
        with pytest.raises(ClaimError, match=r"alice is being made by another command"):
            store.make("alice")
        store.make("bob")


# Who gets in


def test_a_revoked_key_is_refused_once_the_keys_are_read_again(root, store):
    secret = store.make("alice")
    keys = Keys(root)
    assert keys.authenticate(secret).name == "alice"
    store.revoke("alice")
    keys.refresh()
    assert (refusal(keys, secret).status, str(refusal(keys, secret))) == (
        403,
        "this API key is revoked",
    )


def test_keys_follow_the_store_by_themselves(root, store, monkeypatch):
    monkeypatch.setattr(keys_module, "REFRESH_SECONDS", 0.02)
    keys = Keys(root)
    keys.start()
    secret = store.make("alice", Limits(rate=60))

    def comes(wanted):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                found = keys.authenticate(secret).rate
            except ProblemError as error:
                found = error.status
            if found == wanted:
                return True
            time.sleep(0.01)
        return False

    assert comes(60)
    store.change("alice", {"rate": 90})
    assert comes(90)
    store.revoke("alice")
    assert comes(403)
    keys.close()


def test_what_is_no_key_is_told_the_same_whatever_it_is(root, store):
    secret = store.make("alice")
    keys = Keys(root)
    (key,) = store.all()
    others = ["x", "bg_", secret[:-1], secret.upper(), key.sha256, f"bg_{key.sha256}", "\xff" * 9]
    for other in others:
        error = refusal(keys, other)
        assert (error.status, str(error)) == (401, "this is no API key of this endpoint")
        assert error.headers == {"WWW-Authenticate": "Bearer"}
    for nothing in (None, ""):
        error = refusal(keys, nothing)
        assert error.status == 401
        assert "Authorization: Bearer KEY" in str(error)


def test_models_that_a_key_may_use(root, store):
    some = store.make("some", Limits(models=("digits", "pets")))
    every = store.make("every")
    for model in ("pets", "pets@best", "digits@v3"):
        Keys(root).authenticate(some).check_model(model)
    with pytest.raises(ProblemError, match="this API key may not use model faces") as caught:
        Keys(root).authenticate(some).check_model("faces@best")
    assert caught.value.status == 403
    Keys(root).authenticate(every).check_model("faces@best")


def test_a_store_that_cannot_be_read_lets_in_whom_it_let_in_for_a_while(root, store, caplog):
    secret, clock = store.make("alice"), Clock()
    keys = Keys(root, clock=clock)
    folder = Path(store.folder.path)
    folder.rename(f"{folder}.away")
    folder.write_text("no folder")
    clock.now = STALE_SECONDS
    keys.refresh()
    assert f"those of {STALE_SECONDS:.0f} s ago hold for" in caplog.text
    assert keys.authenticate(secret).name == "alice"
    assert refusal(keys, "x").status == 401
    clock.now += 0.1
    for sent in (secret, "x", None):
        assert refusal(keys, sent).status == 503
    with pytest.raises(OSError, match="keys"):
        Keys(root)
    folder.unlink()
    Path(f"{folder}.away").rename(folder)
    keys.refresh()
    assert keys.authenticate(secret).name == "alice"


def test_a_damaged_file_is_no_key_and_harms_no_other(root, store, caplog):
    alice, bob = store.make("alice"), store.make("bob")
    keys = Keys(root)
    file = Path(store.folder.path, "alice.json")
    whole = file.read_text()
    for damage in (whole[:40], "[]", whole.replace('"rate": 600', '"rate": "many"')):
        caplog.clear()
        file.write_text(damage)
        keys.refresh()
        assert "alice.json is damaged" in caplog.text
        assert refusal(keys, alice).status == 401
        assert keys.authenticate(bob).name == "bob"
    file.write_text(whole)
    keys.refresh()
    assert keys.authenticate(alice).name == "alice"
    file.unlink()
    keys.refresh()
    assert refusal(keys, alice).status == 401


# Rates and quotas


@pytest.mark.parametrize("rate", [1, 7, 60, 90, 600, 10_007])
def test_after_retry_after_it_passes_and_a_second_earlier_it_does_not(rate):
    draw = random.Random(rate)
    for _ in range(50):
        clock, key = Clock(NOON + draw.randrange(SECOND)), a_key(rate=rate)
        meter = Meter("/nowhere", clock=clock)
        taken = 0
        while isinstance(answer := meter.take(key, images := draw.randint(1, 64)), Admission):
            taken += images
        # The time in which the missing part of the images comes free.
        missing = taken + images - max(rate, LEAST_BURST)
        assert answer.retry_after == math.ceil(Fraction(missing, rate) * 60)
        clock.wait(answer.retry_after - 1)
        assert isinstance(meter.take(key, images), Refusal)
        clock.wait(1)
        assert isinstance(meter.take(key, images), Admission)


@pytest.mark.parametrize("rate", [10, 60, 96, 6000])
def test_the_rate_is_a_token_buckets(rate):
    """Against one that counts tokens, in fractions."""
    draw, clock, key = random.Random(rate), Clock(NOON), a_key(rate=rate)
    meter, capacity = Meter("/nowhere", clock=clock), max(rate, 64)
    tokens, mean = Fraction(capacity), 60 * 32 / rate
    answers = set()
    for _ in range(2000):
        milliseconds = int(draw.expovariate(1.5 / mean) * 1000)
        clock.now += milliseconds * 10**6
        tokens = min(Fraction(capacity), tokens + Fraction(milliseconds * rate, 60_000))
        images = draw.randint(1, 64)
        answer = meter.take(key, images)
        assert isinstance(answer, Admission) == (tokens >= images)
        if isinstance(answer, Admission):
            tokens -= images
            if draw.random() < 0.1:  # The work failed.
                meter.give_back(key, images)
                tokens += images
        else:
            assert answer.retry_after == math.ceil((images - tokens) * 60 / rate)
        answers.add(type(answer))
    assert answers == {Admission, Refusal}


def test_keys_have_buckets_of_their_own():
    meter = Meter("/nowhere", clock=Clock(NOON))
    for name in ("alice", "bob"):
        assert meter.take(a_key(name, rate=1), 64) == Admission(None)
        assert isinstance(meter.take(a_key(name, rate=1), 1), Refusal)


@pytest.mark.parametrize("rate", [1, 60, 64, 65, 600])
def test_a_full_bucket_holds_a_request_for_images(rate):
    assert GenerateRequest.model_validate({"class": 0, "n": LEAST_BURST})
    meter = Meter("/nowhere", clock=Clock(NOON))
    assert isinstance(meter.take(a_key(rate=rate), LEAST_BURST), Admission)


def test_a_quota_begins_anew_at_midnight_utc(root):
    clock, key = Clock(NOON), a_key(rate=6000, quota=100)
    meter = Meter(root, clock=clock)
    assert meter.take(key, 64) == Admission(36)
    refused = meter.take(key, 37)
    assert refused == Refusal(
        "this API key may have 100 images a day (UTC), 36 of which are left", 12 * 3600
    )
    assert meter.take(key, 36) == Admission(0)
    clock.wait(12 * 3600 - 1)
    assert meter.take(key, 1).retry_after == 1
    clock.now += SECOND - 1
    assert meter.take(key, 1).retry_after == 1
    clock.now += 1
    assert meter.take(key, 64) == Admission(36)
    meter.flush()  # Each day's count is written under its date.
    usage = KeyStore(root).usage
    assert (usage(date(2024, 2, 28)), usage(date(2024, 2, 29))) == ({"alice": 100}, {"alice": 64})


def test_of_rate_and_quota_the_longer_wait_counts():
    clock, key = Clock(NOON + 12 * 60 * MINUTE - 10 * SECOND), a_key(rate=60, quota=100)
    meter = Meter("/nowhere", clock=clock)
    assert meter.take(key, 64) == Admission(36)
    answer = meter.take(key, 64)  # The day ends in 10 s, the bucket is full in 64.
    assert answer.retry_after == 64
    clock.wait(63)
    assert isinstance(meter.take(key, 64), Refusal)
    clock.wait(1)
    assert meter.take(key, 64) == Admission(36)


def test_what_was_refused_is_not_counted_and_what_failed_no_more():
    key = a_key(rate=1, quota=70)
    meter = Meter("/nowhere", clock=Clock(NOON))
    assert meter.take(key, 60) == Admission(10)
    assert isinstance(meter.take(key, 5), Refusal)  # 4 are left in the bucket.
    assert isinstance(meter.take(key, 11), Refusal)
    assert meter.take(key, 4) == Admission(6)
    meter.give_back(key, 60)
    assert meter.take(key, 60) == Admission(6)
    meter.give_back(key, 99)  # Never more than nothing used.
    assert meter.take(key, 64) == Admission(6)
    assert isinstance(meter.take(key, 1), Refusal)


def test_what_no_waiting_lets_through_is_told_so():
    meter = Meter("/nowhere", clock=Clock(NOON))
    problem = meter.take(a_key(quota=50), 71).problem()
    assert problem.status == 403
    assert "may have 50 images a day, not 71" in str(problem)
    assert problem.headers == {}


def test_more_than_a_bucket_holds_is_made_of_a_full_one_and_paid_off_after():
    clock, key = Clock(NOON), a_key(rate=60)
    meter = Meter("/nowhere", clock=clock)
    assert meter.take(key, 1) == Admission(None)
    assert meter.take(key, 256).retry_after == 1  # Until it is full: 64 images, one a second.
    clock.wait(1)
    assert meter.take(key, 256) == Admission(None)
    assert meter.take(key, 1).retry_after == 256 - 64 + 1
    clock.wait(192)
    assert isinstance(meter.take(key, 1), Refusal)
    clock.wait(1)
    assert meter.take(key, 1) == Admission(None)
    assert meter.take(key, 256).retry_after == 64
    clock.now -= 3600 * SECOND
    assert meter.take(key, 256).retry_after == 64  # However far the clock is set back.


def test_a_restart_forgets_only_what_was_not_written_yet(root):
    clock, key = Clock(NOON), a_key(rate=6000, quota=100)
    meter = Meter(root, clock=clock)
    meter.take(key, 30)
    meter.flush()
    meter.take(key, 20)
    killed = Meter(root, clock=clock)
    assert killed.take(key, 1) == Admission(69)
    killed.close()
    assert Meter(root, clock=clock).take(key, 1) == Admission(68)
    clock.wait(12 * 3600)
    assert Meter(root, clock=clock).take(key, 1) == Admission(99)


def test_counts_are_written_as_time_passes_and_at_exit(root, monkeypatch):
    code = f"""
from serving.keys import Key
from serving.limits import Meter
meter = Meter({root!r})
meter.start()
meter.take(Key(name="alice", sha256="", created=""), 3)
"""
    monkeypatch.setattr(limits_module, "FLUSH_SECONDS", 0.02)
    clock = Clock(NOON)
    meter = Meter(root, clock=clock)
    meter.start()
    meter.take(a_key(), 5)
    file = Path(root, "keys/usage/2024-02-28.json")
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    meter.close()
    assert json.loads(file.read_text()) == {"alice": 5}
    subprocess.run([sys.executable, "-c", code], check=True)
    today = {path.name: json.loads(path.read_text()) for path in file.parent.iterdir()}
    assert list(today.values()).count({"alice": 3}) == 1


def test_counts_that_cannot_be_written_are_later(root, store, caplog):
    clock, key = Clock(NOON + 12 * 60 * MINUTE - 1), a_key(quota=100)
    meter = Meter(root, clock=clock)
    meter.take(key, 30)
    usage = Path(root, "keys/usage")
    usage.parent.mkdir(parents=True)
    usage.write_text("no folder")
    meter.flush()
    assert "counts of 2024-02-28 are not written yet" in caplog.text
    clock.now += 1
    assert meter.take(key, 40) == Admission(60)
    usage.unlink()
    meter.flush()
    assert store.usage(date(2024, 2, 28)) == {"alice": 30}
    assert store.usage(date(2024, 2, 29)) == {"alice": 40}


def test_a_clock_set_back_locks_nobody_out_and_begins_no_day_anew(root):
    clock, key = Clock(NOON), a_key(rate=60, quota=100)
    meter = Meter(root, clock=clock)
    assert meter.take(key, 64) == Admission(36)
    clock.wait(-3600)
    assert meter.take(key, 32).retry_after == 32
    clock.wait(32)
    assert meter.take(key, 32) == Admission(4)
    clock.wait(-24 * 3600)
    assert isinstance(meter.take(key, 5), Refusal)
    clock.wait(64)
    assert "a day (UTC), 4 of which are left" in meter.take(key, 5).detail
    assert meter.take(key, 4) == Admission(0)


def test_new_limits_hold_at_once(root):
    clock = Clock(NOON)
    meter = Meter(root, clock=clock)
    assert meter.take(a_key(rate=60, quota=100), 64) == Admission(36)
    assert "50 images a day (UTC), 0 of which are left" in meter.take(a_key(quota=50), 1).detail
    # What was taken is paid off as it was to be, in 64 s; a bucket of 600 is full after 60.
    assert meter.take(a_key(rate=600), 10).retry_after == 64 + 1 - 60
    clock.wait(5)
    assert isinstance(meter.take(a_key(rate=600), 11), Refusal)
    assert isinstance(meter.take(a_key(rate=600), 10), Admission)


def test_threads_never_get_more_than_the_bucket_allows(root):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        still, limited = Meter(root, clock=Clock(NOON)), a_key("bob", rate=6000, quota=777)
        running, key = Meter(root), a_key(rate=6000)
        began = time.time_ns()

        def takes(seed):
            draw, taken = random.Random(seed), [0, 0, 0]
            for _ in range(1500):
                taken[0] += isinstance(still.take(key, 1), Admission)
                taken[1] += isinstance(still.take(limited, 1), Admission)
                images = draw.randint(1, 64)
                if isinstance(running.take(key, images), Admission):
                    taken[2] += images
                    if draw.random() < 0.1:
                        running.give_back(key, images)
                        taken[2] -= images
            return taken

        with ThreadPoolExecutor(8) as pool:
            totals = [sum(part) for part in zip(*pool.map(takes, range(8)), strict=True)]
    finally:
        sys.setswitchinterval(interval)
    seconds = (time.time_ns() - began) / SECOND
    assert totals[:2] == [6000, 777]
    assert 5936 <= totals[2] <= 6000 + 100 * seconds


def test_memory_is_that_of_the_keys_in_use(root):
    clock = Clock(NOON)
    meter = Meter(root, clock=clock)
    for i in range(1000):
        for _ in range(3):
            meter.take(a_key(f"k{i}"), 64)
    clock.wait(30)
    meter.flush()
    assert len(meter._full_at) == 0  # 192 of 600 a minute are back after 19.2 s.
    clock.now += DAY
    meter.take(a_key(), 1)
    meter.flush()
    assert meter._used == {clock.now // DAY: {"alice": 1}}


# The command


@pytest.fixture
def command(root, monkeypatch, capsys):
    """Runs the command here; gives its exit status, stdout and stderr."""
    monkeypatch.setenv("BIGGAN_STORAGE", root)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["serving.keys", *line.split()])
        with pytest.raises(SystemExit) as ended:
            keys_module.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_makes_lists_limits_and_revokes(root, store, command):
    done = subprocess.run(
        [sys.executable, "-m", "serving.keys", "make", "alice", "--quota=50", "--models", "digits"],
        cwd=ROOT,
        env=os.environ | {"BIGGAN_STORAGE": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "key alice: 600 images a minute, 50 a day, of digits." in done.stderr
    secret = done.stdout.strip()  # Nothing else is on stdout.
    assert Keys(root).authenticate(secret).name == "alice"
    store.make("bob")
    store.write_usage(datetime.now(UTC).date(), {"alice": 12})
    limited = "key alice: 90 images a minute, any number a day, of digits\n"
    assert command("limit alice --quota None --rate 90") == (0, limited, "")
    revoked = "key bob is revoked; endpoints refuse it within 3 s\n"
    assert command("revoke bob") == (0, revoked, "")
    status, listed, _ = command("list")
    assert status == 0
    assert re.fullmatch(
        r"alice: 90 images a minute, any number a day, of digits; made 20\S+, 12 images today\n"
        r"bob: 600 images a minute, any number a day, of all models; made .* today; revoked\n",
        listed,
    )
    assert not re.search("bg_|[0-9a-f]{64}", listed)


@pytest.mark.parametrize(
    "line,error",
    [
        ("make alice", "there is a key 'alice' already: choose another name"),
        ("make Bob", "key name 'Bob': use at most 64 lower-case letters"),
        ("make bob --rate 0", "rate = 0: Input should be greater than or equal to 1"),
        ("limit alice --rate 0", "rate = 0: Input should be greater than or equal to 1"),
        ("limit bob", "there is no key 'bob'"),
        ("revoke bob", "there is no key 'bob'"),
    ],
)
def test_mistakes_are_told_in_a_line(store, command, line, error):
    store.make("alice")
    status, out, err = command(line)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {error}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["", "make", "list", "revoke", "limit"])
def test_help_teaches(command, verb):
    status, out, _ = command(f"{verb} --help")
    assert status == 0
    assert f"python -m serving.keys {verb}" in out
    assert not verb or "--storage" in out


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_api_key(root, store):
    variables = os.environ | {"BIGGAN_STORAGE": root, "NAME": "this-machine"}  # As WSL sets it.
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # Of the `make test` that runs this.
        variables.pop(name, None)

    def make(*arguments):
        return subprocess.run(
            ["make", "--old-file=install", f"BIN={Path(sys.executable).parent}", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
        )

    done = make("api-key", "alice")
    assert done.returncode == 0, done.stderr
    assert Keys(root).authenticate(done.stdout.strip()).name == "alice"
    for arguments, name in (
        (["alice"], "alice"),
        (["NAME=alice"], "alice"),
        (["tests"], "tests"),
        (["NAME=test"], "test"),  # Which is a target too.
        ([], ""),
    ):
        planned = make("--dry-run", "api-key", *arguments)
        assert planned.returncode == 0, planned.stderr
        lines = [line for line in planned.stdout.splitlines() if line != ":"]
        assert [line.split(" -m ")[1] for line in lines] == [f"serving.keys make -- '{name}'"]
    clash = make("--dry-run", "api-key", "clean")
    assert clash.returncode == 2
    assert "clean is a target: say make api-key NAME=clean" in clash.stderr
    assert "rm" not in clash.stdout
    assert "No rule to make target 'alice'" in make("--dry-run", "alice").stderr
