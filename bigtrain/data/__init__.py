"""From text to the microbatches of a step. The whole pipeline, in the order in which data flows:

`readers`    files, folders and globs of text and JSON lines -> documents, one function a format
`tokenizer`  text to tokens and back, of any kind of file: sentencepiece, tokenizer.json, tiktoken, a module each;
             `tokenizer_training` makes a sentencepiece model that gives back every byte of any UTF-8 text
`sides`      which documents are held out, by the hash of their text
`build`      documents -> tokens, held-out split, global shuffle, shards (WebDataset tars with an index)
`shard_format`  the format on disk; `shards` opens it: random access to any document through a memory map; `verify`
`text_tars`  tars of raw text by others (`tar_scan` finds the documents), tokenised while they are streamed
`faults`     documents that cannot be used: named, counted, skipped within a limit
`folders`    the files of a shard folder, on a disk or remote: `remote` fetches them (`transports`), `cache` keeps them
`order`      which tokens are in global sequence i: a function of (data, seed, lanes, sequence length). `mixture` finds
             the source, `lanes`, `packing` or `text_lanes` the documents
`rows`       pieces of documents -> rows of tokens, copied once
`microbatch` what one forward pass eats
`loader`     sequences -> the microbatches of one data rank, read ahead by threads; the cursor travels with them
`ledger`     what each data rank was fed; `audit` proves from it that nothing was repeated or left out
`baseline`   what a model that knows only word frequencies would score
`prepare`    what `bigtrain.launch` runs first: make the tokenizer and the shards that a config asks for

Only `loader` and `microbatch` need torch. `build` loads it too, through webdataset, in the moment in which it writes
tars.
"""
