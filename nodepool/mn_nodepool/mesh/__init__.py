"""The mesh: links between peers that carry typed messages. One port (`transport.py`), back ends for sockets and memory."""
