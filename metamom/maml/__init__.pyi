from .boil import BOIL as BOIL
from .learner import MAML as MAML
from .learner import Backward as Backward
from .learner import LossFn as LossFn
from .learner import MetaGradient as MetaGradient
from .protomaml import ProtoMAML as ProtoMAML
from .proximal import Proximal as Proximal
from .reptile import Reptile as Reptile
