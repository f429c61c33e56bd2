"""The texts of `loratune explain` in English: one literal, nothing computed. `uk.py` has the same structure.

Words in backticks are names or commands, and are shown as such. White space does not matter, except in the drawing.
"""

TEXTS = {
    "number": {
        "thousands": ",",
        "decimal": ".",
        "units": ["B", "kB", "MB", "GB", "TB"],
        "percent": "%",
    },
    "words": {
        "roles": "The eight roles",
        "parameters": "The seven parameters",
        "presets": "The presets",
        "advice": "Start basic, then climb",
        "more": "More",
        "ideas": "Also explained",
        "role": "role",
        "parameter": "parameter",
        "preset": "preset",
        "usual_name": "usual name",
        "what": "what it does",
        "when": "when",
        "usual": "usual values",
        "evidence": "evidence",
        "doubled": "when doubled",
        "step_up": "one step up",
        "adapted": "what adapting it changes",
        "on_model": "on this model",
        "name": "name here",
        "shape": "shape O × I",
        "layers": "layers",
        "weights": "weights",
        "map": "which preset reaches which layer",
        "outside": "outside the layers",
        "missing": "this model has none",
        "none_here": "none here",
        "scale": "scale",
        "trained": "trained",
        "share": "share",
        "adapter_file": "adapter",
        "optimizer": "optimizer",
        "flops": "FLOPs",
        "merged": "merged",
        "num_parameters": "parameters",
        "fused": "fused",
    },
    "notes": {
        "columns": """trained: numbers that are trained. share: their part of all the model's numbers and theirs.
            adapter: file in float32. optimizer: AdamW's two moments in float32. FLOPs: added work per token in
            training, beside the frozen linear layers' forward and backward. merged: plain model in the type it is
            stored in.""",
        "fused": """A fused layer serves several roles in one weight and is adapted whole, so a preset may reach
            more roles than it names.""",
        "untied": """The head shares its weight with the embedding. Merging an adapter of the head unties the two,
            hence the larger merged model.""",
        "experts": """The experts' weights are stacked parameters, not layers. The presets do not reach them;
            `target_parameters` does.""",
        "rest": "What is not named is as in `fast`: query and value, r = 8, lora_alpha = 2 r.",
        "same": "Nothing changes in size: only what the training does.",
    },
    "intro": {
        "title": "LoRA: fine-tuning through two small matrices",
        "what": """A linear layer of a model computes y = W x with a large matrix W. LoRA freezes W and trains two
            thin matrices beside it. A turns the input into r numbers, B turns these into a change of the output,
            and s says how much that change counts: y = W x + s B A x.""",
        "drawing": [
            "              x   I numbers",
            "              │",
            "      ┌───────┴────────┐",
            "      ▼                ▼",
            "┌───────────┐    ┌───────────┐",
            "│           │    │  A  r × I │  trained, begins random",
            "│           │    └─────┬─────┘",
            "│ W  O × I  │          │  only r numbers pass here",
            "│  frozen   │    ┌─────┴─────┐",
            "│           │    │  B  O × r │  trained, begins at zero",
            "└─────┬─────┘    └─────┬─────┘",
            "      │                │  × s,  s = lora_alpha / r",
            "      └──────► + ◄─────┘",
            "               │",
            "               ▼",
            "      y = W x + s B A x   O numbers",
        ],
        "facts": [
            "B begins at zero, so before the first step the tuned model is exactly the base model.",
            """Only A and B get gradients: often less than 1% of the numbers, and so little optimizer memory. The
            adapter is a small file of its own, and one base model can serve many.""",
            """Afterwards A and B can stay beside W, or be merged: W' = W + s B A is a plain layer again and costs
            nothing extra to run.""",
            "Some guides write A B x for the same thing: they name the matrices the other way round.",
        ],
        "source": "Hu et al. 2021, LoRA, arXiv 2106.09685",
    },
    "advice": [
        "See it once from start to end: `loratune demo`.",
        """Begin with `fast` (query and value, r = 8). If it is good enough, you are done, and cheaply. Query and
        value first is the paper's cheap choice, not a law: the layers of the MLP often win.""",
        """If the held-out loss stays too high, find the learning rate first: LoRA wants about ten times that of
        full fine-tuning.""",
        """Then climb, one change at a time, on the same held-out rows: more roles (`quality`, `deep`), then a
        higher r. Keep a step only if the loss pays for its cost.""",
        """If training loss falls and held-out loss rises, the adapter learns the rows by heart: train less long,
        take more data, or add dropout.""",
    ],
    "commands": {
        "topic": "`loratune explain r`: one parameter, role or preset",
        "model": "`loratune explain --model MODEL`: your model's layers, sizes and costs",
        "topic_model": "`loratune explain r --model MODEL`: what r costs on your model",
    },
    "topics": {
        "r": {
            "title": "r, the rank",
            "short": "How many numbers pass between A and B: how much new the adapter can learn.",
            "what": """A has r rows and B has r columns, so every change that the adapter can make to W has rank r
                at most. A small r forces a simple change; a large r allows a rich one, and takes more parameters.""",
            "doubled": """A and B double, and so do the adapter file, the gradients and the optimizer. The model's
                own weights and the activations stay the same, so memory as a whole grows little. With `lora_alpha`
                left out (2 r) the scale stays 2; with `lora_alpha` fixed it is halved.""",
            "usual": "8, 16, 32; 64 and more for millions of trained tokens; 1 to 8 for reinforcement learning",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, section 7.2): with query and value adapted in GPT-3, r = 1 was
                already competitive with r = 64 on two tasks.""",
                """Dettmers et al. 2023 (QLoRA, arXiv 2305.14314): once all layers are adapted, r hardly changed the
                result.""",
                """Schulman et al. 2025 (LoRA Without Regret): low ranks follow the same loss curve and leave it
                when the data outgrows the adapter.""",
                """PEFT's comparison on MetaMathQA (2026, Llama 3.2 3B, query and value, scale 2): r = 32 reached
                47.8%, r = 64 47.4% (standard error 1.4 points): no gain.""",
                "vLLM refuses ranks above 16 unless it is started with a larger `--max-lora-rank`.",
            ],
        },
        "lora_alpha": {
            "title": "lora_alpha, the strength of the change",
            "short": "Scales the adapter's contribution: s = lora_alpha / r.",
            "what": """The adapter adds s B A x with s = `lora_alpha` / r. The division by r lets you change r
                without finding a new learning rate. With `use_rslora` s = `lora_alpha` / √r, which is larger for
                high ranks.""",
            "doubled": """s doubles: nothing grows, but every step of B changes the output twice as much. It acts
                much like a higher learning rate, so change the one or the other.""",
            "usual": "r or 2 r (left out: 2 r); some fix it at 32",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, section 4.1): tuning alpha is roughly the same as tuning the
                learning rate, so they set it once and left it.""",
                """Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732): with alpha / r learning slows at high ranks; alpha
                / √r does not.""",
                """PEFT's comparison on MetaMathQA (2026, Llama 3.2 3B, r = 64): scale 8 instead of 2 gave 51.3%
                instead of 47.4%, and about twice the forgetting (0.111 against 0.059).""",
            ],
        },
        "target_modules": {
            "title": "target_modules, which layers are adapted",
            "short": "The layers that get an A and a B: names, a pattern, or a preset.",
            "what": """A list of names (`q_proj`), a regular expression for the whole path, `all-linear`, or a
                preset (`fast`, `quality`, `deep`). A name that matches nothing is an error here, never a silence.""",
            "doubled": """More layers can learn, and the cost grows with their sizes: those of the MLP are the
                largest. The rows below keep r and widen the choice: query and value, all of attention, everything.""",
            "usual": "`fast` to begin, then `quality`, then `deep`",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, sections 4.2 and 7.1) adapted attention only and left the MLP out
                for simplicity. For the same number of parameters, query and value did better than query alone.""",
                """Dettmers et al. 2023 (QLoRA, arXiv 2305.14314): only with all linear layers adapted did LoRA
                match full fine-tuning.""",
                """Biderman et al. 2024 (arXiv 2405.09673): all layers did best, the MLP alone came next, attention
                alone last.""",
                """Schulman et al. 2025 (LoRA Without Regret): attention alone falls behind even when its rank is
                raised to the same number of parameters.""",
                """PEFT's comparison on MetaMathQA (2026, Llama 3.2 3B): the MLP alone with r = 10 reached 49.4%,
                query and value with r = 32 and as many parameters 47.8%, and the MLP forgot less (0.032 against
                0.050).""",
            ],
        },
        "lora_dropout": {
            "title": "lora_dropout, against learning by heart",
            "short": "The share of A's inputs set to zero at random while training.",
            "what": """In each training step a random part of the adapter's input is set to zero, and the rest is
                scaled up to make good for it. The frozen path W x is not touched, and nothing is dropped when the
                model is used.""",
            "doubled": """Twice as many inputs are dropped. The adapter learns more slowly and clings less to single
                rows, which helps when there are few. No parameter is added.""",
            "usual": "0.05, 0.1; 0 when there is plenty of data",
            "evidence": [
                "Srivastava et al. 2014 (Journal of Machine Learning Research 15): dropout itself.",
                """Dettmers et al. 2023 (QLoRA, arXiv 2305.14314) used 0.1 for models up to 13B, and 0.05 for 33B
                and 65B.""",
                "Evidence for one value is thin: let your own held-out loss decide.",
            ],
        },
        "bias": {
            "title": "bias, which biases train",
            "short": "Whether the layers' own biases are trained as well.",
            "what": """`none` trains no bias, `lora_only` those of the adapted layers, `all` every bias of the
                model. The trained biases are the adapter's own: the base is not written.""",
            "doubled": """The next step up is `lora_only`, then `all`. It adds little, and without the adapter the
                base model is what it was. Many recent models (Llama, Gemma) have no biases at all.""",
            "usual": "`none`",
            "evidence": [
                """Ben Zaken et al. 2021 (BitFit, arXiv 2106.10199): on small data sets, training the biases of BERT
                alone comes close to full fine-tuning.""",
                "Hu et al. 2021 (arXiv 2106.09685, section 4.2) trained no biases and left them to later work.",
                "vLLM loads adapters only with `none`.",
            ],
        },
        "modules_to_save": {
            "title": "modules_to_save, what is trained whole",
            "short": "Modules trained in full and saved with the adapter, such as a new head.",
            "what": """A head that is new for the task has random weights, so a change of low rank is not enough: it
                is trained whole. A classification head (`classifier`, `score`) is added by itself for its
                `task_type`.""",
            "doubled": """Each module counts with all its weights, not with r (O + I). For a language model's head
                that is often more than the rest of the adapter together.""",
            "usual": "nothing; `classifier` or `score` for classification; `lm_head` for new tokens",
            "evidence": [
                "Hu et al. 2021 (arXiv 2106.09685): for GLUE, the task's head is trained beside the adapter.",
                "For a few new tokens `trainable_token_indices` trains their rows of the embedding alone.",
                "vLLM and llama.cpp do not load adapters with modules saved whole.",
            ],
        },
        "task_type": {
            "title": "task_type, what the model is for",
            "short": "The task, and with it the head and the loss.",
            "what": """`CAUSAL_LM` continues text, `SEQ_CLS` labels a text, `TOKEN_CLS` labels each token,
                `SEQ_2_SEQ_LM` turns one text into another, `QUESTION_ANS` finds an answer in a text,
                `FEATURE_EXTRACTION` gives a vector.""",
            "doubled": "It is no number. It chooses the head and the loss; the adapter is the same for each of them.",
            "usual": "`CAUSAL_LM`",
            "evidence": [
                "The names are PEFT's (2022 and later), so that other tools know what they load.",
                """Hu et al. 2021 (arXiv 2106.09685) used one and the same LoRA for classification (RoBERTa,
                DeBERTa) and for generation (GPT-2, GPT-3).""",
            ],
        },
        "query": {
            "title": "query, q_proj",
            "short": "What each position looks for in the text.",
            "what": """From each position attention makes a query: what this position wants to know. Queries are
                compared with the keys of other positions, and the best matches get the most weight.""",
            "doubled": "Changes where the model looks. It cannot by itself change what is read there.",
            "usual": "in `fast`, `quality` and `deep`",
            "evidence": [
                "Vaswani et al. 2017 (arXiv 1706.03762): attention itself.",
                """Hu et al. 2021 (arXiv 2106.09685, table 5): in GPT-3, query alone reached 70.4% on WikiSQL, query
                and value with as many parameters 73.7%.""",
            ],
        },
        "key": {
            "title": "key, k_proj",
            "short": "What each position offers to be found by.",
            "what": """From each position attention makes a key: the label that queries are compared with. Query and
                key only ever meet as a product, so adapting one of the two does much of what adapting both does.""",
            "doubled": """Changes by what a position is found. Small in recent models, where several query heads
                share one key.""",
            "usual": "in `quality` and `deep`",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, table 5): in GPT-3, key alone did worst of the four attention
                layers (70.0% on WikiSQL; output, the best, 73.2%).""",
                "Ainslie et al. 2023 (GQA, arXiv 2305.13245): why there are fewer keys and values than queries.",
            ],
        },
        "value": {
            "title": "value, v_proj",
            "short": "What is read out of a position once attention has found it.",
            "what": """From each position attention makes a value: what it passes on to those that look at it. The
                values are added up, each with the weight that its key has earned.""",
            "doubled": "Changes what is read, without changing where the model looks.",
            "usual": "in `fast`, `quality` and `deep`",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, table 5): in GPT-3, value alone reached 73.0% on WikiSQL, query
                alone 70.4%; on MultiNLI both 91.0%.""",
                "Ainslie et al. 2023 (GQA, arXiv 2305.13245): why there are fewer keys and values than queries.",
            ],
        },
        "output": {
            "title": "output, o_proj",
            "short": "Brings the result of attention back into the main stream.",
            "what": """The heads' results are laid side by side, and the output layer mixes them back to the hidden
                size, to be added to the stream that runs through all layers.""",
            "doubled": "Changes how the heads' findings are combined.",
            "usual": "in `quality` and `deep`",
            "evidence": [
                "Vaswani et al. 2017 (arXiv 1706.03762): the heads and the layer that joins them.",
                """Hu et al. 2021 (arXiv 2106.09685, table 5): in GPT-3, output alone (r = 8) came close to query
                and value (r = 4): 73.2% against 73.7% on WikiSQL, 91.3% for both on MultiNLI.""",
            ],
        },
        "gate": {
            "title": "gate, gate_proj",
            "short": "Decides which parts of the MLP open for this token.",
            "what": """The gate goes through the activation function and then multiplies the up layer's result,
                number by number: it lets through what matters here. Older families have none.""",
            "doubled": "Changes when a piece of knowledge is used.",
            "usual": "in `deep`",
            "evidence": [
                "Shazeer 2020 (GLU variants, arXiv 2002.05202): gated MLPs do better than plain ones.",
                """Schulman et al. 2025 (LoRA Without Regret): adapting the MLP does better than adapting attention
                alone, and adding attention to it brings little.""",
            ],
        },
        "up": {
            "title": "up, up_proj",
            "short": "Widens the hidden size inside the MLP.",
            "what": """Each row of the up layer looks for one pattern in the hidden state. There are several times
                more rows than the hidden size is wide.""",
            "doubled": "Changes which patterns the MLP notices.",
            "usual": "in `deep`",
            "evidence": [
                """Geva et al. 2021 (arXiv 2012.14913): the MLP works like a memory, whose first layer holds keys,
                that is, patterns in the text.""",
                """PEFT's comparison on MetaMathQA (2026, Llama 3.2 3B): the MLP alone (gate, up, down) did better
                than query and value with as many parameters, 49.4% against 47.8%.""",
            ],
        },
        "down": {
            "title": "down, down_proj",
            "short": "Narrows the MLP's result back to the hidden size.",
            "what": """Each column of the down layer is what the MLP adds to the stream when its pattern has been
                found. Much of what a model knows is stored here.""",
            "doubled": "Changes what the MLP says when a pattern is there.",
            "usual": "in `deep`",
            "evidence": [
                """Geva et al. 2021 (arXiv 2012.14913): the second layer of the MLP holds the values of the memory,
                and they point at the next token.""",
                "Biderman et al. 2024 (arXiv 2405.09673): the MLP alone learned more than attention alone.",
            ],
        },
        "head": {
            "title": "head, lm_head",
            "short": "Turns the hidden state into a score for every token.",
            "what": """One row for each token of the vocabulary. In many models it is the same matrix as the
                embedding of the input (tied), and merging an adapter of it makes two matrices of one.""",
            "doubled": """B has one row for each token, so the head alone can outweigh all the layers in a model
                with a large vocabulary.""",
            "usual": "in `deep`; worth it for new words, a new language or a new format",
            "evidence": [
                "Press and Wolf 2017 (arXiv 1608.05859): why the embedding and the head are tied.",
                """Practice differs: the training service Tinker (2025) adapts the head by default, Biderman et al.
                2024 (arXiv 2405.09673) did not. No clean comparison is known to us: measure.""",
            ],
        },
        "fast": {
            "title": "fast, the first rung",
            "short": "To begin, and when data or time is short.",
            "what": """Query and value, r = 8, lora_alpha = 16. The choice of the paper: the cheapest that works for
                most tasks that ask for a style, a format or a narrow skill.""",
            "doubled": "A higher r alone often brings less than more roles: see `quality` and `deep`.",
            "usual": "the default",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, table 5): in GPT-3, query and value did better than query and
                key with as many parameters: 73.7% against 71.4% on WikiSQL.""",
                """It is the cheap choice, not the strong one: with as many parameters, the MLP did better in PEFT's
                comparison (2026) and in Schulman et al. 2025.""",
            ],
        },
        "quality": {
            "title": "quality, the second rung",
            "short": "When `fast` leaves the held-out loss too high.",
            "what": "All of attention (query, key, value, output), r = 16, lora_alpha = 32.",
            "doubled": """If this rung brings nothing over `fast`, still try `deep` before you stop: the MLP may pay
                where attention does not.""",
            "usual": "when `fast` is not enough",
            "evidence": [
                """Hu et al. 2021 (arXiv 2106.09685, table 5): the four attention layers with r = 2 did as well as
                query and value with r = 4 on WikiSQL (73.7%), and a little better on MultiNLI (91.7% to 91.3%).""",
                "Schulman et al. 2025 (LoRA Without Regret): attention alone, whatever its rank, falls behind the MLP.",
            ],
        },
        "deep": {
            "title": "deep (or expert), the third rung",
            "short": "For the most that LoRA can learn: new knowledge, a new language.",
            "what": "All eight roles, the MLP and the head among them, r = 32, lora_alpha = 64.",
            "doubled": """Beyond this, more data usually brings more than a higher r. On little data it learns by
                heart sooner: watch the held-out loss.""",
            "usual": "when there are many rows, or the task is far from what the model knows",
            "evidence": [
                """Dettmers et al. 2023 (QLoRA, arXiv 2305.14314) and Schulman et al. 2025 (LoRA Without Regret):
                with all layers adapted, LoRA matches full fine-tuning on data of usual size.""",
                """Biderman et al. 2024 (arXiv 2405.09673): it still learns less than full fine-tuning on billions
                of tokens, and forgets less.""",
                "vLLM needs `--max-lora-rank 32` for it.",
            ],
        },
        "scale": {
            "title": "scale, s in W + s B A",
            "short": "How much the adapter's change counts: s = lora_alpha / r.",
            "what": """One number for the whole adapter, set by `lora_alpha` and r, not trained. When the adapter is
                merged it is multiplied in. With `use_rslora` s = `lora_alpha` / √r.""",
            "doubled": """The change of the output doubles, and so does the effect of each step of B: much like a
                higher learning rate.""",
            "usual": "1 to 2",
            "evidence": [
                "Hu et al. 2021 (arXiv 2106.09685, section 4.1): the scale, and why it divides by r.",
                "Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732): dividing by √r keeps high ranks learning.",
            ],
        },
        "merge": {
            "title": "merge, W' = W + s B A",
            "short": "Adds the change into the weights: a plain model that needs no adapter.",
            "what": """B A has the shape of W, so the sum can be stored in W's place. The merged model is as fast
                and as large as the base model, and any program can load it; but the adapter can no longer be
                exchanged, and in 16 bits small changes are partly rounded away. `loratune export` says how much.""",
            "doubled": """A merged model does not grow with r: whatever r was, the sum has the shape of W. It grows
                only when a tied head is adapted.""",
            "usual": "keep the adapter while you try things out; merge to hand the model on",
            "evidence": [
                "Hu et al. 2021 (arXiv 2106.09685, section 4.1): merged, LoRA adds no time when the model is used.",
                "Without merging the added work is two thin products for each adapted layer: see FLOPs.",
            ],
        },
        "A": {
            "title": "A, the matrix that reads",
            "short": "Turns a layer's input of I numbers into r numbers; begins random.",
            "what": """A has r rows of I numbers. Each row looks for one direction in the input. It begins random
                (Kaiming, uniform within ± 1 / √I), so that the directions differ from the start.""",
            "doubled": "Doubling r gives A twice the rows: twice the directions to look for.",
            "usual": "r × I; trained in float32",
            "evidence": [
                """Hayou et al. 2024 (arXiv 2406.08447): A random and B zero allows higher learning rates, and on
                average gave better results, than the other way round.""",
                "Hayou et al. 2024 (LoRA+, arXiv 2402.12354): A learns best with a lower learning rate than B.",
            ],
        },
        "B": {
            "title": "B, the matrix that writes",
            "short": "Turns these r numbers into a change of the O outputs; begins at zero.",
            "what": """B has O rows and r columns. Each column is a direction that the adapter can add to the
                output. It begins at zero, so that the first step starts from exactly the base model.""",
            "doubled": "Doubling r gives B twice the columns: twice the directions to write.",
            "usual": "O × r; trained in float32",
            "evidence": [
                "Hu et al. 2021 (arXiv 2106.09685, section 4.1): B A is zero at the start of training.",
                """Hayou et al. 2024 (LoRA+, arXiv 2402.12354): a higher learning rate for B than for A gave 1 to 2%
                better results, up to 2 times as fast.""",
            ],
        },
    },
}
