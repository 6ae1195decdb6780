from .board import TensorBoard as TensorBoard
from .callbacks import Callback as Callback
from .callbacks import RunState as RunState
from .early_stopping import EarlyStopping as EarlyStopping
from .loop import TrainResult as TrainResult
from .loop import train as train
