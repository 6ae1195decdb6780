from .app import COMMANDS as COMMANDS
from .app import main as main
