"""Misspelt and wrong-typed settings of every command: each is one line that names the key."""

from pathlib import Path

from benchmarks.hostile.inputs.rows import Row
from benchmarks.hostile.stores import evaluating, predicting, training

# what is set in a training run, and what the line must name
TRAINING = [
    ("model.dims_=3", "dims_"),
    ("model.depth=3", "depth"),
    ("model.dim=wide", "model.dim"),
    ("model.dim=16.5", "model.dim"),
    ("model.dim=-8", "model.dim"),
    ("model.dim=15", "model.dim"),
    ("model.num_heads=8", "num_heads"),
    ("model.num_layers=0", "num_layers"),
    ("model.attention=fast", "attention"),
    ("model.kernel_size=2", "kernel_size"),
    ("model.embedding_stencil=[2,1,1]", "embedding_stencil"),
    ("model.gradient_features=perhaps", "gradient_features"),
    ("model=huge", "huge"),
    ("optimizer=sgd", "sgd"),
    ("optimizer.learning_rate=fast", "learning_rate"),
    ("optimizer.learning_rate=-1e-3", "learning_rate"),
    ("optimizer.learning_rate=nan", "learning_rate"),
    ("optimizer.lr=1e-3", "lr"),
    ("optimizer.betas=[0.9]", "betas"),
    ("optimizer.betas=[0.9,1.5]", "betas"),
    ("optimizer.warmup_steps=6", "warmup_steps"),
    ("optimizer.schedule=linear", "schedule"),
    ("optimizer.freeze=[nothing.has.this.name]", "freeze|nothing"),
    ("+optimizer.factors={nothing.*: 2.0}", "factors|nothing"),
    ("optimizer.gradient_clip=0", "gradient_clip"),
    ("trainer.max_step=5", "max_step"),
    ("trainer.max_steps=1e9x", "max_steps"),
    ("trainer.max_steps=0", "max_steps"),
    ("trainer.precision=8-bit", "precision"),
    ("trainer.accelerator=tpu", "accelerator"),
    ("trainer.devices=0", "devices"),
    ("trainer.strategy=pipeline", "strategy"),
    ("trainer.checkpoint_format=sharded", "checkpoint_format"),
    ("trainer.accumulate=0", "accumulate"),
    ("trainer.profiler=best", "profiler"),
    ("data.window.time=0", "window.time"),
    ("data.window.lat=7", "window|lat|token"),
    ("data.window.time=1000", "window|steps|time"),
    ("data.windows=3", "windows"),
    ("data.batch_size=two", "batch_size"),
    ("data.batch_size=3 data.windows_per_read=2", "windows_per_read"),
    ("data.read.engine=quick", "engine"),
    ("data.unreadable=ignore", "unreadable"),
    ("data.first_guess=perhaps", "first_guess"),
    ("+data.transforms.ozone={kind: log, scale: 1.0}", "ozone"),
    ("+data.transforms.temperature={kind: cube, scale: 1.0}", "kind|cube"),
    ("+data.transforms.temperature={kind: log, scale: 0}", "scale"),
    ("masking=random", "random"),
    ("masking.ratio_=0.3", "ratio_"),
    ("objective.losses=null", "losses"),
    ("objective.losses={mse: 1.0}", "mse"),
    ("objective.train_only=head", "train_only"),
    ("objective.train_only=tail", "train_only|warm_start"),
    ("stream.air.role=output", "role"),
    ("stream.air.levels=[500,700]", "700"),
    ("stream.air.levels=[500,500]", "levels|500"),
    ("stream.air.variables=[ozone]", "ozone"),
    ("stream.air.variables=[]", "variables"),
    ("stream.air.variables=[temperature,temperature]", "temperature"),
    ("stream.air.token_size.lat=3", "token|lat"),
    ("stream.air.missing=drop", "missing"),
    ("stream.air.loss_weight=-1", "loss_weight"),
    ("~stream.air", "stream"),
    ("tasks=[{nme:forecast}]", "tasks"),
    ("data.name=wave", "wave"),
    ("data.catalog=none.yaml", "none.yaml"),
    ("experiment=fastest", "fastest"),
    ("seed=-1", "seed"),
    ("seed=first", "seed"),
    ("resume=none.ckpt", "none.ckpt"),
    ("warm_start.checkpoints=[none.ckpt]", "none.ckpt"),
    ("warm_start.low_rank.rank=4", "low_rank|warm_start"),
    ("nonsense=1", "nonsense"),
    ("+nonsense=1", "nonsense"),
    ("logger.tensorboard=often", "tensorboard"),
    ("model.dim", "model.dim"),
    ("=5", "=5|override"),
]
# of a prediction
PREDICTION = [
    ("task.lead_tim=6h", "lead_tim"),
    ("tilings=0", "tilings"),
    ("overlap=1.0", "overlap"),
    ("every=0", "every"),
    ("split=exam", "split"),
    ("layout=grads", "layout"),
    ("missing=guess", "missing"),
    ("resume=perhaps", "resume"),
    ("segment=none", "none"),
    ("data=wave", "wave"),
    ("checkpoint=none.ckpt", "none.ckpt"),
    ("checkpoints=fix/tiny.ckpt", "checkpoints"),
    ("init_time=yesterday", "yesterday"),
    ("init_time=2001-13-01", "2001-13-01"),
    ("init_time=1900-01-01", "1900-01-01"),
    ("init_time=[]", "init_time"),
    ("output=out.txt", "out.txt"),
    ("batch_size=0", "batch_size"),
    ("seed=-2", "seed"),
    ("input_limits=perhaps", "input_limits"),
]
EVALUATION = [
    ("bootstrap=0", "bootstrap"),
    ("regions=[mars]", "mars"),
    ("boxes={europe: [35, 75, -12]}", "boxes"),
    ("boxes={europe: [75, 35, -12, 42]}", "boxes|europe|75"),
    ("tails=[0.9,0.1]", "tails"),
    ("tails=[0,1]", "tails"),
    ("tasks=[weather]", "weather"),
    ("tasks=[]", "tasks"),
    ("split=train", "split"),
    ("climatology=none.zarr", "none.zarr"),
    ("forecasts=[none.zarr]", "none.zarr"),
    ("segment=none", "none"),
    ("forecast=[a.zarr]", "forecast"),
]
OTHERS = [
    (("data", "ingest", "output=o.zarr"), "input"),
    (("data", "ingest", "input=none.nc", "output=o.zarr"), "none.nc"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.nc"), "o.nc"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "levels=[700]"), "700"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "levels=[low]"), "levels"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "start=1990", "end=1991"), "1990"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "start=soon"), "start|soon"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "region=[50,40,0,9]"), "region"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "region=[0,9]"), "region"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "layout.times=3"), "times"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "layout.compression=30"),
     "compression"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "workers.engine=ray"), "engine"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "variables.ozone=o3"), "ozone|o3"),
    (("data", "ingest", "input=fix/test.zarr", "output=o.zarr", "select.nmber=0"), "nmber"),
    (("data", "inspect"), "name"),
    (("data", "inspect", "wave", "data.catalog=fix/catalog.yaml"), "wave"),
    (("data", "inspect", "waves", "data.catalog=fix/catalog.yaml", "sample=3"), "sample"),
    (("data", "inspect", "waves", "data.catalog=fix/catalog.yaml", "samples=0"), "samples"),
    (("data", "paint"), "paint"),
    (("paint",), "paint"),
    (("config", "print"), "print"),
    (("info", "checkpoint=none.ckpt"), "none.ckpt"),
    (("info", "memory=much"), "much"),
    (("export", "checkpoint=fix/tiny.ckpt"), "output"),
    (("export", "checkpoint=fix/tiny.ckpt", "output=o.ckpt", "format=onnx"), "format"),
    (("export", "checkpoint=none.ckpt", "output=o.ckpt"), "none.ckpt"),
]  # fmt: skip


def rows() -> list[Row]:
    fixtures = Path("fix")
    rows = [
        Row(f"train {given}", "refused", tuple(training(fixtures, "run", *given.split(" data."))),
            (word,))
        if " data." not in given
        else Row(f"train {given}", "refused",
                 tuple(training(fixtures, "run", *given.split(" "))), (word,))
        for given, word in TRAINING
    ]  # fmt: skip
    for command, make, table in (
        ("predict", predicting, PREDICTION),
        ("evaluate", evaluating, EVALUATION),
    ):
        output = "out.zarr" if command == "predict" else "report"
        rows += [
            Row(f"{command} {given}", "refused", tuple(make(fixtures, output, given)), (word,))
            for given, word in table
        ]
    rows += [Row(" ".join(given), "refused", given, (word,)) for given, word in OTHERS]
    climate = tuple(["data", "stats", *training(fixtures, "run")[1:]])
    rows += [
        Row("stats climatologies=[weekly]", "refused",
            (*climate, "climatologies=[weekly]", "output=c"), ("climatologies|weekly",)),
        Row("stats climatologies without output", "refused",
            (*climate, "climatologies=[month]"), ("output",)),
        Row("stats memory_mib=0", "refused", (*climate, "memory_mib=0"), ("memory_mib",)),
    ]  # fmt: skip
    return rows
