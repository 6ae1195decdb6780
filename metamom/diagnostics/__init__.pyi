from .bias_meter import AtSize as AtSize
from .bias_meter import Measured as Measured
from .bias_meter import Part as Part
from .bias_meter import measure as measure
from .while_training import TrackBias as TrackBias
from .while_training import check_track as check_track
from .while_training import track as track
