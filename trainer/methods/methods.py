"""All methods by name."""

from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.sfd import Sfd
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2

AnyMethod = WarmDmd2 | Dmd2 | Sfd

METHODS: dict[str, type[Method]] = {
    kind.facts.name: kind for kind in (WarmDmd2, Dmd2, Sfd)
}
