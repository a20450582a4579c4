"""The tests' small run for the command line: toy_config.py:STUDENT,TEACHER."""

import dataclasses

import ml_collections
import toys

from prefix_distill import config as config_lib
from prefix_distill.config import CheckpointSpec
from prefix_distill.config import MeshSpec


def get_config(argument: str) -> ml_collections.ConfigDict:
  student, teacher = argument.split(",")
  config = toys.run_config(
      student,
      teacher,
      steps=8,
      mesh=MeshSpec(data=-1, fsdp=2),
      checkpoint=CheckpointSpec(every=2),
  )
  # With a teacher's prompt, every array that a batch can have is there; and
  # some prompts are too long.
  data = dataclasses.replace(
      config.data,
      teacher_prompt="{question} It is {answer}.",
      max_prompt_len=46,
      max_teacher_prompt_len=101,
  )
  config = dataclasses.replace(config, data=data)
  return ml_collections.ConfigDict(config_lib.to_dict(config))
