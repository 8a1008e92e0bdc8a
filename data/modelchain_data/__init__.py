"""Data: shards in (`index`), batches out (`batches`), and how shards are made (`pack`)."""
