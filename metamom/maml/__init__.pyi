from .learner import MAML as MAML
from .learner import Backward as Backward
from .learner import LossFn as LossFn
from .learner import MetaGradient as MetaGradient
from .proximal import Proximal as Proximal
