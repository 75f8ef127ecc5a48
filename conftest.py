"""Examples of what needs Gradio run where it is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("gradio") else ["actsteer/looking/play.py"]
