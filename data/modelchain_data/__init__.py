"""Data: shards in (`build`, `index`), batches out (`batches`), and how shards are made (`pack`)."""
