"""TensorBoard's own writer on values that `crates/lora-train/src/callbacks/tensorboard/file.rs` writes in its test.

python make_tensorboard.py ../../crates/lora-train/tests/golden
"""

import sys
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

DT_STRING = 7


def begin(writer, time, step):
    writer.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
    start = SessionLog(status=SessionLog.START)
    writer.write(Event(wall_time=time, step=step, session_log=start).SerializeToString())


def summary(writer, time, step, *values):
    writer.write(Event(wall_time=time, step=step, summary=Summary(value=values)).SerializeToString())


def main(folder):
    value = Summary.Value
    with open(Path(folder) / "tensorboard.tfevents", "wb") as file:
        writer = RecordWriter(file)
        begin(writer, 1000.5, 0)
        scalars = [("loss/current", 0.25), ("lr/unet", 1e-4), ("loss/nan", float("nan"))]
        summary(writer, 1001.0, 1, *[value(tag=tag, simple_value=number) for tag, number in scalars])
        summary(writer, 1002.0, 300, value(tag="loss/current", simple_value=0.0))
        image = Summary.Image(height=200, width=2, colorspace=3, encoded_image_string=b"not really a PNG")
        plugin = SummaryMetadata.PluginData(plugin_name="images")
        about = SummaryMetadata(plugin_data=plugin, summary_description="a cat, 猫")
        summary(writer, 1003.0, 300, value(tag="samples/1", image=image, metadata=about))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        text = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[b"a long answer " * 20])
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        about = SummaryMetadata(plugin_data=plugin, summary_description="a question")
        summary(writer, 1004.0, 300, value(tag="samples/2", tensor=text, metadata=about))
        begin(writer, 2000.5, 301)


if __name__ == "__main__":
    main(sys.argv[1])
