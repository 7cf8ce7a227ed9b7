"""Which operators run at the same time: queues of one compute engine, such as the streams of a GPU."""
