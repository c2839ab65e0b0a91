"""Reading Arrow IPC that somebody else may have written, without trusting what it says of its own sizes.

Arrow checks that buffers lie inside the file when a batch is loaded, and that offsets lie inside the values when it is
asked to. What it does not refuse are compressed buffers, which nobody here writes: a few kilobytes become gigabytes.
"""

import struct

import pyarrow as pa

MAGIC_BYTES = 8
"""Before the stream in a file."""
_HEADER, _COMPRESSION = 2, 3
"""Numbers of fields: of a Message its header, of a RecordBatch its compression (format/Message.fbs of Arrow)."""


def stream_batches(stream: pa.Buffer, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The batches of an IPC stream, zero-copy and valid; ValueError unless it is whole and has exactly this schema."""
    with pa.ipc.open_stream(stream) as reader:
        if not reader.schema.equals(schema, check_metadata=True):
            raise ValueError("another schema is expected")
        _refuse_compression(stream)
        batches = list(reader)
    for batch in batches:
        batch.validate(full=True)
        if any(map(_has_nulls, batch.columns)):
            raise ValueError("a value is missing")
    return batches


def file_batches(contents: pa.Buffer, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The batches of an IPC file; a ValueError unless it is whole and has exactly this schema.

    They are read as the stream that the file holds, past the footer, which could name other places.
    """
    with pa.ipc.open_file(contents) as whole:
        if not whole.schema.equals(schema, check_metadata=True):
            raise ValueError("another schema is expected")
        num_batches = whole.num_record_batches
    batches = stream_batches(contents.slice(MAGIC_BYTES), schema)
    if len(batches) != num_batches:
        raise ValueError(f"{len(batches)} batches; its footer says {num_batches}")
    return batches


def _refuse_compression(stream: pa.Buffer) -> None:
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise ValueError("its buffers are compressed")
        if message.type not in ("schema", "record batch"):
            raise ValueError(f"it holds a {message.type}")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the header of a Message, a flatbuffer, has the field that says so."""
    message = struct.unpack_from("<I", metadata)[0]
    header = _field(metadata, message, _HEADER)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _field(metadata, batch, _COMPRESSION) != 0


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where a field of a table lies; 0 if the table leaves it out."""
    fields = table - struct.unpack_from("<i", metadata, table)[0]
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", metadata, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", metadata, fields + place)[0]
    return table + offset if offset else 0


def _has_nulls(array: pa.Array) -> bool:
    nested = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    return bool(array.null_count) or (nested and _has_nulls(array.values))
