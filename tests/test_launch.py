"""The launch scripts: what they print is what they run, and that is right."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import toys
import yaml

_ROOT = pathlib.Path(__file__).parent.parent
_LAUNCH = _ROOT / "launch"
_SCRIPTS = ("local.sh", "slurm.sh", "tpu.sh", "gke.sh")
# What survives every layer of quoting, or shows where it does not.
_HARD = (
    "--config.data.teacher_prompt={question}\n\nit's \"A & B\" $HOME $$ $(id)"
    " `id` \\n | ; * {1,2} #é ~"
)
_ARGUMENTS = ("--config=configs/math.py:tiny", "--config.steps=2", _HARD)
_BUCKET = "gs://my-bucket/runs/it's a run"
_TPU = ("--name=t1", "--zone", "us-west4-a", "--project=p")
_GKE = (
    "--name=t1",
    "--project=p",
    "--location=us-west4",
    "--cluster=c",
    "--machine=ct5lp-hightpu-4t",
    "--topology=4x4",
)
_SLURM = ("--name=t1", "--workdir=/scratch/it's a run")

# Appends its name, arguments and input to the file CALLS, one JSON a line.
_RECORDER = f"""#!{sys.executable} -S
import json, os, sys
given = sys.stdin.read() if sys.argv[-2:] == ["-f", "-"] else ""
with open(os.environ["CALLS"], "a") as file:
  file.write(json.dumps([[sys.argv[0], *sys.argv[1:]], given]) + "\\n")
"""


def executable(path: pathlib.Path, text: str) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return str(path)


class Place:
  """A directory whose `bin` comes first on the PATH."""

  def __init__(self, root: pathlib.Path):
    self.root, self.file = root, root / "calls"
    self.environment = os.environ | {
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(self.file),
        "HOME": str(root),
    }

  def stub(self, *names: str, text: str = _RECORDER) -> None:
    for name in names:
      executable(self.root / "bin" / name, text)

  def run(self, *command: str, given: str | None = None):
    return subprocess.run(
        command,
        cwd=self.root,
        env=self.environment,
        input=given,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )

  def launch(self, script: str, *arguments: str):
    return self.run(str(_LAUNCH / script), *arguments)

  def calls(self) -> list:
    """Returns the stubs' arguments and inputs since the last time."""
    lines = []
    if self.file.is_file():
      lines = [json.loads(x) for x in self.file.read_text().splitlines()]
      self.file.unlink()
    name = {f"{self.root}/bin/{x}": x for x in os.listdir(self.root / "bin")}
    return [[[name.get(a[0], a[0]), *a[1:]], given] for a, given in lines]


@pytest.fixture
def place(tmp_path):
  place = Place(tmp_path)
  place.stub(
      "gcloud",
      "kubectl",
      "sbatch",
      "squeue",
      "scancel",
      "tail",
      "mkdir",
      "python3",
      "stub_python",
  )
  executable(tmp_path / ".venv" / "bin" / "pip", _RECORDER)
  return place


def dashes(*arguments: str) -> tuple[str, ...]:
  return ("--", *(arguments or _ARGUMENTS))


# Every sub-command, and the commands of it; "..." ends those that are checked
# further down.
_CASES = {
    "tpu.sh create": (
        (*_TPU, "--type=v5litepod-16"),
        "gcloud compute tpus queued-resources create t1"
        " --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite --node-id=t1"
        " --zone=us-west4-a --project=p",
    ),
    "tpu.sh create --slices 2": (
        (*_TPU, "--type", "v6e-16", "--slices", "2", "--spot"),
        "gcloud compute tpus queued-resources create t1"
        " --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"
        " --node-count=2 --node-prefix=t1 --spot"
        " --zone=us-west4-a --project=p",
    ),
    "tpu.sh create --plain": (
        (*_TPU, "--type=v4-16", "--version=tpu-ubuntu2204-base", "--spot"),
        "gcloud compute tpus tpu-vm create t1 --accelerator-type=v4-16"
        " --version=tpu-ubuntu2204-base --spot --zone=us-west4-a --project=p",
    ),
    "tpu.sh setup": (
        (*_TPU, "--repo=https://host/it's mine.git", "--ref=dev"),
        "gcloud compute tpus queued-resources ssh t1 --worker=all --node=all"
        " ...",
    ),
    "tpu.sh setup --plain": (
        (*_TPU, "--repo=https://host/it's mine.git", "--ref=dev"),
        "gcloud compute tpus tpu-vm ssh t1 --worker=all ...",
    ),
    "tpu.sh run": (
        (*_TPU, f"--workdir={_BUCKET}", *dashes()),
        "gcloud compute tpus queued-resources ssh t1 --worker=all --node=all"
        " ...",
    ),
    "tpu.sh logs": (
        (*_TPU, "--worker=3", "--slice=1"),
        "gcloud compute tpus queued-resources ssh t1 --worker=3 --node=1"
        " '--command=tail -n 100 -F ~/run.log' --zone=us-west4-a --project=p",
    ),
    "tpu.sh logs --plain": (
        (*_TPU,),
        "gcloud compute tpus tpu-vm ssh t1 --worker=0"
        " '--command=tail -n 100 -F ~/run.log' --zone=us-west4-a --project=p",
    ),
    "tpu.sh status": (
        (*_TPU,),
        "gcloud compute tpus queued-resources describe t1"
        " '--format=value(state.state)' --zone=us-west4-a --project=p",
        "gcloud compute tpus queued-resources ssh t1 --worker=all --node=all"
        " ...",
    ),
    "tpu.sh status --plain": (
        (*_TPU,),
        "gcloud compute tpus tpu-vm describe t1 '--format=value(state)'"
        " --zone=us-west4-a --project=p",
        "gcloud compute tpus tpu-vm ssh t1 --worker=all ...",
    ),
    "tpu.sh delete": (
        (*_TPU,),
        "gcloud compute tpus queued-resources delete t1 --force --quiet"
        " --zone=us-west4-a --project=p",
    ),
    "tpu.sh delete --plain": (
        (*_TPU,),
        "gcloud compute tpus tpu-vm delete t1 --quiet --zone=us-west4-a"
        " --project=p",
    ),
    "gke.sh create": (
        (*_GKE, "--slices=2", "--zone=us-west4-a", "--spot"),
        *(
            f"gcloud container node-pools create t1-{i} --cluster=c --project=p"
            " --location=us-west4 --node-locations=us-west4-a"
            " --machine-type=ct5lp-hightpu-4t --tpu-topology=4x4 --num-nodes=4"
            " --workload-metadata=GKE_METADATA --spot"
            for i in range(2)
        ),
    ),
    "gke.sh setup": (
        (*_GKE,),
        "gcloud container clusters get-credentials c --project=p"
        " --location=us-west4",
        "kubectl --context=gke_p_us-west4_c apply --server-side -f"
        " https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/"
        "manifests.yaml",
    ),
    "gke.sh run": (
        (
            *_GKE, "--repo=https://host/it's mine.git",
            f"--workdir={_BUCKET}", *dashes(),
        ),
        "kubectl --context=gke_p_us-west4_c apply -f -",
    ),
    "gke.sh logs": (
        (*_GKE, "--worker=2", "--slice=1"),
        "kubectl --context=gke_p_us-west4_c logs --follow --tail=100"
        " --container=train --selector=jobset.sigs.k8s.io/jobset-name=t1,"
        "jobset.sigs.k8s.io/job-index=1,"
        "batch.kubernetes.io/job-completion-index=2",
    ),
    "gke.sh status": (
        (*_GKE,),
        "kubectl --context=gke_p_us-west4_c get jobset t1",
        "kubectl --context=gke_p_us-west4_c get pods"
        " --selector=jobset.sigs.k8s.io/jobset-name=t1",
    ),
    "gke.sh delete": (
        (*_GKE,),
        "kubectl --context=gke_p_us-west4_c delete jobset t1"
        " --ignore-not-found",
        "gcloud container node-pools delete t1-0 --cluster=c --project=p"
        " --location=us-west4 --quiet",
    ),
    "gke.sh delete --keep-nodes": (
        (*_GKE,),
        "kubectl --context=gke_p_us-west4_c delete jobset t1"
        " --ignore-not-found",
    ),
    "slurm.sh setup": (
        (),
        "python3 -m venv .venv",
        ".venv/bin/pip install -e '.[cuda13]'",
    ),
    "slurm.sh setup --cuda 12": (
        (),
        "python3 -m venv .venv",
        ".venv/bin/pip install -e '.[cuda12]'",
    ),
    "slurm.sh run": (
        (*_SLURM, "--nodes=2", "--partition=gpu", *dashes()),
        "mkdir -p '/scratch/it'\\''s a run'",
        "sbatch --job-name=t1 --dependency=singleton --nodes=2"
        " --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0"
        " --time=24:00:00 --requeue --signal=B:USR1@600 --open-mode=append"
        " '--output=/scratch/it'\\''s a run/slurm.log' --partition=gpu"
        f" {_LAUNCH}/slurm_job.sh .venv/bin/python -m prefix_distill.main"
        " --distributed=slurm '--workdir=/scratch/it'\\''s a run'"
        " --notice=600 "
        + shlex.join(_ARGUMENTS),
    ),
    "slurm.sh logs": (
        (*_SLURM,),
        "tail -n 100 -F '/scratch/it'\\''s a run/slurm.log'",
    ),
    "slurm.sh status": (
        (*_SLURM,),
        "squeue --user=$USER --name=t1",
        "tail -n 3 '/scratch/it'\\''s a run/slurm.log'",
    ),
    "slurm.sh delete": ((*_SLURM,), "scancel --user=$USER --name=t1"),
    "local.sh run": (
        ("--python=stub_python", "--workdir=a b", *dashes()),
        "stub_python -m prefix_distill.main '--workdir=a b' "
        + shlex.join(_ARGUMENTS),
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_sub_command_runs_what_its_dry_run_prints(case, place):
  (script, *words), (flags, *golden) = case.split(), _CASES[case]
  real = place.launch(script, *words, *flags)
  assert real.returncode == 0, real.stderr
  calls = place.calls()

  user = subprocess.check_output(["id", "-un"], text=True).strip()
  wanted = [shlex.split(line.replace("$USER", user)) for line in golden]
  got = [argv for argv, _ in calls]
  assert len(got) == len(wanted)
  for argv, want in zip(got, wanted, strict=True):
    if want[-1] == "...":
      argv, want = argv[: len(want) - 1], want[:-1]
    assert argv == want

  printed = place.launch(script, "--dry-run", *words, *flags)
  assert printed.returncode == 0, printed.stderr
  assert not place.calls(), "a dry run ran something"
  pasted = place.run("bash", "-euo", "pipefail", given=printed.stdout)
  assert pasted.returncode == 0, pasted.stderr
  assert place.calls() == calls


@pytest.mark.parametrize("limit", ["UNLIMITED", "infinite", "-1", "1-0", "11"])
def test_slurm_gets_the_time_limit_as_it_is(limit, place):
  done = place.launch(
      "slurm.sh",
      "run",
      "--name=n",
      "--workdir=/d",
      f"--time={limit}",
      "--dry-run",
      *dashes(),
  )
  assert done.returncode == 0 and f" --time={limit} " in done.stdout


def test_slurm_needs_no_create(place):
  done = place.launch("slurm.sh", "create")
  assert done.returncode == 0 and not place.calls()
  assert done.stdout == (
      "SLURM hands out the nodes by itself: create is not needed.\n"
  )


# Bad command lines, and what the one sentence says.
_BAD = {
    "tpu.sh": "no sub-command; it is one of: create setup run",
    "local.sh walk": "walk is no sub-command; it is one of: run.",
    "local.sh run run": "run comes after the sub-command run",
    "local.sh run --nodes=2 -- --config=x": "--nodes=2 is no flag of local.sh",
    "local.sh run '--port grace'": "--port grace is no flag of local.sh",
    "local.sh run --port": "--port needs a value.",
    "local.sh run --port --config=x": "--port needs a value.",
    "local.sh run --processes=two -- --config=x": "--processes is 'two'; it is",
    "local.sh run --processes=0 -- --config=x": "--processes is '0'; it is a",
    "local.sh run --processes= -- --config=x": "--processes is missing",
    "local.sh run": "nothing after `--`; flags of prefix_distill.main go there",
    "local.sh run -- --config.steps=2": "no --config after `--`",
    "local.sh run -- --config=x --workdir=y": "--workdir=y comes after `--`",
    "local.sh run -- --config=x --distributed=auto": "local.sh sets it",
    "local.sh run --workdir=gs://b/d -- --config=x": "mount the bucket",
    "slurm.sh run --name=n -- --config=x": "--workdir is missing; run needs it",
    "slurm.sh run --workdir=/d -- --config=x": "--name is missing",
    "slurm.sh run --name=n --workdir=gs://b/d -- --config=x": "mount the",
    "slurm.sh run --name=n --workdir=/d --gpus=a -- --config=x": "--gpus is",
    "slurm.sh run --name=n --workdir=/d --time=10 --notice=600 -- --config=x": (
        "--notice 600 is not below the 600 seconds of --time 10"
    ),
    "slurm.sh run --name=n --workdir=/d --time=9:59 -- --config=x": "the 599 s",
    "slurm.sh run --name=n --workdir=/d --time=0:08:09 -- --config=x": "489 s",
    "slurm.sh run --name=n --workdir=/d --time=0-0:9 -- --config=x": "540 s",
    "slurm.sh run --name=n --workdir=/d --time=1h -- --config=x": "sbatch",
    "slurm.sh setup --cuda=11": "--cuda is '11'; it is 12 or 13.",
    "tpu.sh create --zone=z --type=v5litepod-16": "--name is missing",
    "tpu.sh create --name=A --zone=z": "--name is 'A'; it is up to 40",
    "tpu.sh create --name=a --type=v6e-8": "--zone is missing; create needs",
    "tpu.sh create --name=a --zone=z": "--type is missing; create needs it.",
    "tpu.sh create --name=a --zone=z --type=v9-8": "none is known for --type",
    "tpu.sh create --name=a --zone=z --plain=yes": "--plain=yes is no flag",
    "tpu.sh create --name=a --zone=z --plain --slices=2": "--plain is one",
    "tpu.sh setup --name=a --zone=z": "--repo is missing; setup needs it.",
    "tpu.sh run --name=a --zone=z --workdir=/d -- --config=x": "gs://bucket/",
    "tpu.sh run --name=a --zone=z --workdir=gs://b1 -- --config=x": "/DIR (no",
    "tpu.sh run --name=a --zone=z --workdir=gs://b1/d": "nothing after `--`",
    "gke.sh status --name=a --location=l --cluster=c": "--project is missing",
    "gke.sh create --name=a --project=p --location=l --cluster=c --zone=z": (
        "--machine is missing; create needs it."
    ),
    "gke.sh create --name=a --project=p --location=l --cluster=c --zone=z"
    " --machine=n2-standard-4 --topology=4x4": "a TPU machine type ends in",
    "gke.sh create --name=a --project=p --location=l --cluster=c --zone=z"
    " --machine=ct9-hightpu-4t --topology=4x4": "ct4p, ct5lp, ct5p and ct6e",
    "gke.sh create --name=a --project=p --location=l --cluster=c --zone=z"
    " --machine=ct6e-standard-4t --topology=16": "--topology is '16'; it is",
    "gke.sh create --name=a --project=p --location=l --cluster=c --zone=z"
    " --machine=ct6e-standard-4t --topology=3x3": "is 9 chips, which",
}


@pytest.mark.parametrize("line", _BAD)
def test_a_bad_command_line_ends_in_one_sentence(line, place):
  done = place.launch(*shlex.split(line))
  assert done.returncode == 2
  assert done.stdout == "" and not place.calls()
  (sentence,) = done.stderr.splitlines()
  assert sentence.startswith("error: ") and _BAD[line] in sentence


@pytest.mark.parametrize("script", _SCRIPTS)
def test_help_names_every_flag_and_sub_command(script, place):
  done = place.launch(script, "run", "--help")
  assert done.returncode == 0 and not done.stderr
  text = (_LAUNCH / script).read_text()
  for kind, dash in (("flags", "--"), ("switches", "--"), ("actions", "")):
    (words,) = re.findall(rf"\b{kind}='([^']*)'", text)
    for word in words.split():
      named = re.search(rf"(?<![-\w]){dash}{word}\b", done.stdout)
      assert named or (script, word) == ("slurm.sh", "create"), word
  assert "--dry-run" in done.stdout and "#" not in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 80


def test_shellcheck_finds_nothing():
  path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.defpath}"
  found = shutil.which("shellcheck", path=path)
  assert found, "shellcheck is missing; pip install -e '.[test]' has it"
  done = subprocess.run(
      [found, "-x", *sorted(_LAUNCH.glob("*.sh"))],
      cwd=_ROOT,
      text=True,
      capture_output=True,
      check=False,
  )
  assert done.returncode == 0, done.stdout


# On the hosts of a TPU slice.


@pytest.fixture
def host(tmp_path):
  """A host: gcloud runs the remote command here."""
  host = Place(tmp_path)
  host.stub(
      "gcloud",
      text="#!/usr/bin/env bash\n"
      "for x; do\n"
      '  [[ $x != --command=* ]] || exec bash -c "${x#--command=}"\n'
      "done\n",
  )
  host.stub("gcsfuse", "git", "curl", "sudo")
  host.stub("mountpoint", text="#!/bin/sh\nexit 1\n")
  host.stub("hostname", text="#!/bin/sh\necho host-0\n")
  (tmp_path / "prefix_distill").mkdir()
  return host


def test_a_host_is_set_up(host):
  (host.root / "prefix_distill").rmdir()
  host.stub("git", text=_RECORDER + "os.makedirs('prefix_distill', 511, 1)\n")
  uv = executable(host.root / ".local" / "bin" / "uv", _RECORDER)
  done = host.launch(
      "tpu.sh", "setup", *_TPU, "--repo=https://host/it's mine", "--ref=dev"
  )
  assert done.returncode == 0, done.stderr
  clone = str(host.root / "prefix_distill")
  assert [argv for argv, _ in host.calls() if argv[0] != "sudo"] == [
      ["git", "clone", "https://host/it's mine", clone],
      ["git", "fetch", "origin", "dev"],
      ["git", "checkout", "--detach", "FETCH_HEAD"],
      ["curl", "-LsSf", "https://astral.sh/uv/install.sh"],
      [uv, "venv", "--python", "3.11", ".venv"],
      [
          uv,
          "pip",
          "install",
          "--python",
          ".venv/bin/python",
          "-e",
          ".[tpu]",
      ],
  ]


def _wait_for(path: pathlib.Path) -> str:
  deadline = time.monotonic() + 30
  while not (path.is_file() and path.read_text()):
    assert time.monotonic() < deadline, path
    time.sleep(0.05)
  return path.read_text()


def test_a_run_on_a_host_outlives_the_connection_and_is_alone(host):
  python = host.root / "prefix_distill" / ".venv" / "bin" / "python"
  executable(
      python,
      _RECORDER + "print('starts', flush=True)\nimport time\ntime.sleep(60)\n",
  )
  run = ("run", *_TPU, f"--workdir={_BUCKET}", *dashes())
  done = host.launch("tpu.sh", *run)
  assert done.returncode == 0, done.stderr
  process = int(_wait_for(host.root / "run.pid"))
  try:
    assert _wait_for(host.root / "run.log") == "starts\n"
    assert os.getsid(process) == process  # No hang-up reaches it.
    mounted = str(host.root / "gcs" / "my-bucket")
    assert host.calls() == [
        [
            [
                "gcsfuse",
                "--metadata-cache-ttl-secs=0",
                "--metadata-cache-negative-ttl-secs=0",
                "my-bucket",
                mounted,
            ],
            "",
        ],
        [
            [
                ".venv/bin/python",
                "-m",
                "prefix_distill.main",
                "--distributed=auto",
                f"--workdir={mounted}/runs/it's a run",
                *_ARGUMENTS,
            ],
            "",
        ],
    ]
    again = host.launch("tpu.sh", *run)
    assert again.returncode == 1 and "host-0: a run is alive" in again.stderr
    assert host.launch("tpu.sh", "status", *_TPU).stdout == "host-0: runs\n"
  finally:
    os.kill(process, signal.SIGKILL)
  deadline = time.monotonic() + 10
  while (said := host.launch("tpu.sh", "status", *_TPU).stdout) != (
      "host-0: does not run: starts\n"
  ):
    assert time.monotonic() < deadline, said


# In the pods of a JobSet.


def test_the_manifest_is_a_job_of_all_hosts_for_each_slice(place):
  done = place.launch(
      "gke.sh",
      "run",
      *_GKE,
      "--slices=2",
      "--restarts=7",
      "--repo=https://host/it's mine.git",
      f"--workdir={_BUCKET}",
      *dashes(),
  )
  assert done.returncode == 0, done.stderr
  ((_, manifest),) = place.calls()
  account, jobset = yaml.safe_load_all(manifest)
  assert account["kind"] == "ServiceAccount"
  assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 7}
  (slices,) = jobset["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert (slices["replicas"], job["parallelism"], job["completions"]) == (
      2,
      4,
      4,
  )
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["serviceAccountName"] == account["metadata"]["name"]
  assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
      "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,), (volume,) = pod["containers"], pod["volumes"]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert container["volumeMounts"] == [
      {"name": volume["name"], "mountPath": "/gcs"}
  ]

  # What the container runs, after Kubernetes has read $$ as $.
  command = [x.replace("$$", "$") for x in container["command"]]
  clone = str(place.root / "clone")
  command[2] = command[2].replace("/prefix_distill\n", f"{clone}\n")
  place.stub("git", text=_RECORDER + "os.makedirs(sys.argv[-1])\n")
  place.stub("pip", "python")
  done = place.run(*command)
  assert done.returncode == 0, done.stderr
  assert [argv for argv, _ in place.calls()] == [
      [
          "git",
          "clone",
          "--depth",
          "1",
          "--branch",
          "main",
          "https://host/it's mine.git",
          clone,
      ],
      ["pip", "install", "--quiet", "-e", ".[tpu]"],
      [
          "python",
          "-m",
          "prefix_distill.main",
          "--distributed=auto",
          "--notice=120",
          "--workdir=/gcs/runs/it's a run",
          *_ARGUMENTS,
      ],
  ]


def test_a_pod_on_spot_capacity_has_less_time_to_save(place):
  place.launch(
      "gke.sh",
      "run",
      *_GKE,
      "--spot",
      "--repo=r",
      f"--workdir={_BUCKET}",
      *dashes(),
  )
  ((_, manifest),) = place.calls()
  _, jobset = yaml.safe_load_all(manifest)
  (slices,) = jobset["spec"]["replicatedJobs"]
  pod = slices["template"]["spec"]["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 15
  assert "--notice=15 " in pod["containers"][0]["command"][2]


# In a SLURM job.


@pytest.fixture
def job(tmp_path):
  """A job whose step ends as TRAINING says; `scancel` signals the step."""
  job = Place(tmp_path)
  job.environment["SLURM_JOB_ID"] = "17"
  job.stub("scontrol")
  job.stub(
      "srun",
      text="#!/usr/bin/env bash\n"
      "while [[ $1 == --* ]]; do shift; done\n"
      'echo $$ > step; exec "$@"\n',
  )
  job.stub(
      "scancel",
      text=_RECORDER
      + (
          "import signal\n"
          "os.kill(int(open('step').read()), signal.SIGTERM)\n"
      ),
  )
  return job


def _batch(job, training: str, signalled: bool) -> int:
  process = subprocess.Popen(
      [_LAUNCH / "slurm_job.sh", "bash", "-c", training],
      cwd=job.root,
      env=job.environment,
  )
  if signalled:
    _wait_for(job.root / "ready")
    process.send_signal(signal.SIGUSR1)
  return process.wait(240)


_UNTIL_TERM = (
    "trap 'sleep 0.3; exit %d' TERM; echo x > ready;"
    " for i in {1..1000}; do sleep 0.1; done"
)


def test_a_job_at_its_time_limit_saves_and_is_requeued(job):
  assert _batch(job, _UNTIL_TERM % 130, True) == 130
  assert [argv for argv, _ in job.calls()] == [
      ["scancel", "--signal=TERM", "17"],
      ["scontrol", "requeue", "17"],
  ]


def test_a_job_that_finished_in_time_is_not_requeued(job):
  assert _batch(job, _UNTIL_TERM % 0, True) == 0
  assert [argv[0] for argv, _ in job.calls()] == ["scancel"]


def test_a_job_that_failed_is_not_requeued(job):
  assert _batch(job, "exit 3", False) == 3
  assert not job.calls()


# On one machine.


def test_several_processes_know_their_number_and_where_they_meet(place):
  place.environment["XLA_FLAGS"] = "--xla_one --xla_two"
  done = place.launch(
      "local.sh",
      "run",
      "--dry-run",
      "--processes=2",
      "--devices=3",
      "--port=1234",
      "--workdir=a b",
      "--python=stub_python",
      *dashes("--config=configs/math.py"),
  )
  assert done.stdout.splitlines() == [
      *(
          "env -u JAX_NUM_CPU_DEVICES JAX_PLATFORMS=cpu"
          " 'XLA_FLAGS=--xla_one --xla_two"
          " --xla_force_host_platform_device_count=3'"
          " stub_python -m prefix_distill.main --distributed=localhost:1234"
          f" --num_processes=2 --process_id={i} '--workdir=a b'"
          " --config=configs/math.py &"
          for i in range(2)
      ),
      "wait",
  ]
  place.run("bash", given=done.stdout)
  numbers = [argv[5] for argv, _ in place.calls()]
  assert sorted(numbers) == ["--process_id=0", "--process_id=1"]


def _locally(place, text: str) -> subprocess.Popen:
  """Starts three processes of a bash script that knows its `id`."""
  python = executable(
      place.root / "fake",
      "#!/usr/bin/env bash\n"
      'for x; do case $x in --process_id=*) id=${x#*=} ;; esac; done\n' + text,
  )
  return subprocess.Popen(
      toys.interruptible(
          _LAUNCH / "local.sh",
          "run",
          f"--python={python}",
          "--processes=3",
          "--grace=1",
          *dashes(),
      ),
      cwd=place.root,
      env=place.environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
  )


def _alive(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return False
  return True


def test_if_a_process_fails_the_others_are_killed(place):
  process = _locally(place, """
echo $$ > pid$id
while [[ ! -s pid0 || ! -s pid1 || ! -s pid2 ]]; do sleep 0.05; done
(( id != 1 )) || exit 3
trap '' TERM INT
sleep 100
""")
  _, err = process.communicate(timeout=240)
  assert process.returncode == 3
  assert "Process 1 ended with status 3; the others end as well." in err
  pids = [(place.root / f"pid{i}").read_text() for i in range(3)]
  deadline = time.monotonic() + 10
  while any(map(_alive, pids)):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_ctrl_c_goes_to_all_and_they_save(place):
  process = _locally(place, """
trap 'sleep 0.4; echo > saved$id; exit 130' INT
echo x > pid$id
for i in {1..1000}; do sleep 0.1; done
""")
  for i in range(3):
    _wait_for(place.root / f"pid{i}")
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=240)
  assert process.returncode == 130
  assert all((place.root / f"saved{i}").is_file() for i in range(3))


def test_two_processes_train_to_the_end(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  workdir = tmp_path / "a run"
  small = {
      "steps": 2,
      "mesh.fsdp": 2,
      "data.batch_size": 4,
      "rollout.max_len": 8,
      "prefix.buckets": "(8,)",
      "evaluation.max_len": 8,
      "evaluation.every": 0,
      "evaluation.batch_size": 4,
      "evaluation.greedy": False,
      "evaluation.teacher": False,
      "evaluation.sets.heldout.size": 4,
  }
  done = subprocess.run(
      [
          _LAUNCH / "local.sh",
          "run",
          "--processes=2",
          "--devices=2",
          f"--port={port}",
          f"--workdir={workdir}",
          f"--python={sys.executable}",
          "--",
          "--config=configs/math.py:tiny",
          *(f"--config.{name}={value}" for name, value in small.items()),
      ],
      cwd=_ROOT,
      text=True,
      capture_output=True,
      timeout=280,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-5000:]
  assert "mesh data 2 x fsdp 2" in done.stdout
  assert (workdir / "export" / "model.safetensors").is_file()
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  updates = [x for x in map(json.loads, lines) if "prefix_len" in x]
  assert [x["step"] for x in updates] == [1, 2]
