"""Images that a commit would change beside its own: how clients are told. Source: docs/siblings.md."""

from qmpd.control.guard import TOLD
from qmpd.control.qapi import QapiModel, Str
from qmpd.control.registry import event
from qmpd.jobs.siblings import SiblingPolicy


class SiblingImage(QapiModel):
    """``image`` is backed by ``backing``, which the commit writes to: paths, or names of nodes that are in no file."""

    image: Str
    backing: Str


class SiblingsTold(QapiModel):
    """Job ``id`` begins although it will change what other images show: ``policy`` is ``warn`` or ``allow``."""

    id: Str
    policy: SiblingPolicy
    siblings: list[SiblingImage]


event(TOLD, SiblingsTold, features=("unstable",))
