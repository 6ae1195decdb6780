from .bias_meter import AtSize as AtSize
from .bias_meter import Measured as Measured
from .bias_meter import Part as Part
from .bias_meter import TrackBias as TrackBias
from .bias_meter import check_track as check_track
from .bias_meter import measure as measure
from .bias_meter import track as track
