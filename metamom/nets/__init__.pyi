from .models import Conv4 as Conv4
from .models import SinusoidMLP as SinusoidMLP
from .models import use_batch_statistics as use_batch_statistics
from .resnet import ResNet12 as ResNet12
from .shipped import Pretrained as Pretrained
from .shipped import pretrained as pretrained
