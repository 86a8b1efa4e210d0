"""All methods by name."""

from fewstep.trainer.methods.cdm import Cdm
from fewstep.trainer.methods.decoupled_dmd import DecoupledDmd
from fewstep.trainer.methods.disback import Disback
from fewstep.trainer.methods.dmd import Dmd
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.dmd2_gan import Dmd2Gan
from fewstep.trainer.methods.dmdr import Dmdr
from fewstep.trainer.methods.dp_dmd import DpDmd
from fewstep.trainer.methods.embedding_loss import EmbeddingLoss
from fewstep.trainer.methods.f_distill import FDistill
from fewstep.trainer.methods.lcm import Lcm
from fewstep.trainer.methods.meanflow import Meanflow
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.msd import Msd
from fewstep.trainer.methods.phased_dmd import PhasedDmd
from fewstep.trainer.methods.progressive import Progressive
from fewstep.trainer.methods.real_uid import RealUidMethod
from fewstep.trainer.methods.senseflow import Senseflow
from fewstep.trainer.methods.sfd import Sfd
from fewstep.trainer.methods.sid import Sid, SidFewStep
from fewstep.trainer.methods.sim import Sim
from fewstep.trainer.methods.swd import Swd
from fewstep.trainer.methods.tcd import Tcd
from fewstep.trainer.methods.tdm import Tdm
from fewstep.trainer.methods.uni_dad import UniDad
from fewstep.trainer.methods.wadi import Wadi
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2

AnyMethod = (
    WarmDmd2
    | Dmd2
    | Sfd
    | Dmd
    | DecoupledDmd
    | DpDmd
    | Cdm
    | Senseflow
    | Sid
    | SidFewStep
    | Sim
    | RealUidMethod
    | Wadi
    | Lcm
    | Tcd
    | Progressive
    | Meanflow
    | PhasedDmd
    | Tdm
    | UniDad
    | Msd
    | Dmdr
    | Disback
    | Dmd2Gan
    | FDistill
    | EmbeddingLoss
    | Swd
)

METHODS: dict[str, type[Method]] = {
    kind.facts.name: kind
    for kind in (
        WarmDmd2,
        Dmd2,
        Sfd,
        Dmd,
        DecoupledDmd,
        DpDmd,
        Cdm,
        Senseflow,
        Sid,
        SidFewStep,
        Sim,
        RealUidMethod,
        Wadi,
        Lcm,
        Tcd,
        Progressive,
        Meanflow,
        PhasedDmd,
        Tdm,
        UniDad,
        Msd,
        Dmdr,
        Disback,
        Dmd2Gan,
        FDistill,
        EmbeddingLoss,
        Swd,
    )
}
