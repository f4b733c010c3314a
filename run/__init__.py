"""What keeps a real run alive: flags, checks, logs, checkpoints, watching, processes, plugins.

Nothing in here is part of the algorithm; train.py calls it, a line at a time.

    flags.py        every option of a run: declared where it acts, read here, from a file or typed
    values.py       what may stand behind a flag: true, numbers within bounds
    combinations.py flags that have no meaning together
    setup.py        the policy, its reference, the optimizer and the sampler, as flags say
    launch.py       torchrun, quietly, and with the run's exit status
    session.py      ranks meet, and any end is told in one last line
    start.py        the output folder: what a run goes on from, what moves out of its way
    checks.py       what can be wrong is found before a model is loaded; ranks agree
    machine.py      what this machine has room for
    templates.py    what a chat template opens of an answer
    download.py     a model of the hub, with its bytes told
    models.py       what a model's configuration tells: whether it can be trained here
    scorer.py       the same of a reward model
    finite.py       numbers that are not finite are told, and not saved
    health.py       a run that cannot learn says so
    readers.py      jsonl, json, csv, parquet, the hub
    plugins.py      rewards in files of your own
    answers.py      what counts as an equal answer
    alphabet.py     signs of many scripts and typesetters become one alphabet
    choices.py      letters of options, bases, words
    notation.py     many ways of writing an answer become one
    numerals.py     a number in words, in digits
    quantities.py   numbers with units, read exactly
    units.py        what a number counts, and amounts in two units
    unworked.py     sums and products that nobody has worked out are no answer
    hedges.py       `at least 18` states no number
    intervals.py    inequalities and brackets, read as the same parts
    judge.py        a process that compares answers, and that no answer can hang
    jail.py         a process that may only compute: what compares answers is one
    placement.py    what vLLM's flags mean: its device, its settings
    engine.py       vLLM in a process of its own, which all ranks call
    weights.py      the transport of weights into the engine
    fingerprint.py  whether two have the same weights
    watch.py        ranks meet, and notice when one is lost
    console.py      standard output that is closed or full ends no run
    stop.py         a signal asks a run to end; a process ends with its parent
    lines.py        metrics.jsonl: whole lines, whatever happens
    log.py          metrics, completions, progress
    shown.py        what is worth showing of them, in words
    display.py      the panel on a terminal that follows a run
    reports.py      TensorBoard, W&B, trackio
    folder.py       a run's folder: one run at a time, which checkpoints are whole
    drift.py        how far the policy that samples is from the one that is trained
    tokens.py       what a step did to each token
    report/         a page to look at
    checkpoints.py  save, prune, resume
    reference.py    a reference that moves, in a checkpoint
    plan.py         what a run takes, before it is paid for

    adapters.py     a LoRA folder that a run goes on from
    moved.py        where what a run has recorded lies now
    passes.py       pass@k, maj@k, intervals
    trained.py      what a run has left, for the three commands:
    evaluate.py     how often a checkpoint is right
    chat.py         talk to one
    merge.py        adapters become part of the model
"""
