# make demo    build, install into .venv, and watch the bundled pair work
# make chat    the same with a public chat model, fetched once (93 MiB), to talk to
# make test    everything that has to hold: formatting, lints, stubs, Rust tests, Python tests
# make check   the part of it that runs nothing: formatting, lints, docs, stubs
# make quick   what to run before each commit: formatting, lints, types, the fast tests; see CONTRIBUTING.md
# make install the same without the watching: what builds the package and what runs it, none of the tools of the tests
# make wheel   the wheel that an index takes, in dist/: with kernels, and for any Linux with a glibc from 2.28 on
# make dist    that wheel and the source distribution, checked, installed into fresh environments and tried; part of `make test`
# make gpu-bundle  what a GPU machine without a network needs, in build/gpu-bundle: wheels, tests, measurements, a training in pieces
# make kernels compile the CUDA kernels for every architecture and compare what they take and issue with cuda/{registers,instructions}.txt
# make test-processors  what depends on the processor, as a lesser one would run it; part of `make test`
# make sglang-test   DFLASH_RS in real SGLang on this CPU, in its own environment .venv-sglang; part of `make test`
# make sglang-hybrids   the same with targets that have recurrent layers, all cases of it (half an hour and more); few are part of `make test`
# make sglang-long   what else is too long for `make test`: adapters, trees on two ranks, prefill and decode servers
# make sglang-demo   the bundled pair served by real SGLang on this CPU, without and with DFLASH_RS
# make sweep   every causal architecture of transformers as a tiny target (an hour): exact or refused by name; writes docs/models.md
# make bench   all benchmarks; writes benchmarks/results/*.json and docs/img/*.png
# make soak    random lives of the engine for MINUTES=10 from SEED=1 on; says how to replay the one that failed
# make mutants small faults in the core and in the kernels' logic, one at a time: do the tests notice? See docs/testing.md
# make clean   removes build outputs (make distclean: the virtual environments, too)
#
# Needs: Python >= 3.10 with venv, a Rust toolchain, a C linker (the tests: a C++ compiler), and package registries. The
# tests run against the installed wheel, never against the source tree. No CUDA and no GPU: `make kernels` installs the
# compiler into .venv, and what is built after that contains the kernels; DFLASH_CUDA=0 leaves all of that out. `make wheel` installs
# a linker (zig) besides, and what is built after that runs with a glibc from 2.28 on.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo chat test check quick kernels wheel gpu-bundle dist sweep bench clean distclean lint rust-test install venv stubs python-test test-processors sglang-test \
  sglang-hybrids sglang-long sglang-demo sglang-install bench-core bench-demo bench-trees bench-coupled bench-overlap bench-rows bench-hybrid bench-peers bench-host \
  bench-reference bench-sglang soak mutants mutants-tools

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SGLANG_VENV ?= .venv-sglang
SGLANG := $(SGLANG_VENV)/bin
# The first Python that is new enough; PYTHON=... on the command line overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)

# The reference implementation, an oracle of the tests and a row of the benchmarks. Only its loop is wanted; the data-set packages
# of its command line stay out.
REFERENCE := dflash==0.1.0

# By another name, because what names $(MAKE) runs in a dry run, too.
LANE := $(MAKE)

# The source tree must not shadow the installed package, and PyO3 must build against our interpreter.
unexport PYTHONPATH
export PYO3_PYTHON := $(abspath $(BIN)/python)
export CARGO_TERM_COLOR ?= auto

PACKAGE_SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md build.rs \
  $(shell find src cuda python docs/architecture.md -type f -not -name '*.pyc' -not -name '*.so')

demo: install
	$(BIN)/dflash-rs generate --example 43 --max-tokens 160 --temperature 0.7 --seed 1
	$(BIN)/dflash-rs bench --suite demo --prompts 8 --max-tokens 96 --repeat 3

chat: install
	$(BIN)/dflash-rs models get smollm2
	$(BIN)/dflash-rs chat --model smollm2

# Two lanes side by side: SGLang's tests wait for servers half of their time.
test: kernels dist install sglang-install
	$(BIN)/python scripts/lanes.py "$(LANE) lint rust-test stubs python-test test-processors" "$(LANE) sglang-test"

check: lint stubs

# In the order in which mistakes are found fastest. Everything else, and every case of these, is for `make test`.
QUICK_RUST := --lib --test engine --test kv --test rng --test rounds --test stats --test tree
QUICK_PYTHON := $(addprefix tests/python/test_,arguments.py cli_doctor.py detokenizer.py engine_core.py records.py requests.py serving.py streams.py verify.py)
quick: venv
	cargo fmt --all --check
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/python -m mypy
	cargo clippy --locked --quiet --lib --features python -- -D warnings
	cargo test --locked --quiet $(QUICK_RUST)
	@$(LANE) --no-print-directory install
	$(BIN)/python -m pytest -q $(QUICK_PYTHON)

lint: venv
	cargo fmt --all --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	VENV=$(VENV) scripts/format_cuda.sh --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --lib --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet

rust-test:
	cargo test --locked

kernels: $(VENV)/.stamp-nvcc
ifneq ($(DFLASH_CUDA),0)
	$(BIN)/python scripts/kernel_table.py
endif

# Both compilers first: `install` then has the very wheel.
wheel: $(VENV)/.stamp-nvcc $(VENV)/.stamp-zig $(VENV)/.stamp-wheel

# GPU_BUNDLE is passed on, such as GPU_BUNDLE="--python 3.13 --sglang sglang.tar.xz".
GPU_BUNDLE ?=
gpu-bundle: wheel install
	$(BIN)/python scripts/gpu_bundle build/gpu-bundle --wheel dist/*.whl $(GPU_BUNDLE)

dist: wheel venv
	rm -f dist/*.tar.gz
	$(BIN)/maturin sdist --out dist
	$(BIN)/python scripts/dist.py check dist
	$(BIN)/python scripts/dist.py try dist $(if $(filter 0,$(DFLASH_CUDA)),,--kernels)

stubs: install venv
	cd $(VENV) && bin/python -m mypy.stubtest dflash_rs._core --allowlist $(CURDIR)/scripts/stubtest-allowlist.txt

python-test: install venv
	cd / && $(abspath $(BIN))/python -c "import dflash_rs, sys; assert dflash_rs.__file__.startswith(sys.prefix), dflash_rs.__file__"
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest tests/emulated

test-processors: install venv
	$(BIN)/python scripts/processors.py

sweep: install venv
	$(BIN)/python -m tests.sweep --json build/sweep.json --table docs/models.md

# SGLang asks for the versions it likes, .venv has ours; so it gets an environment of its own, which sees .venv for torch and
# for the package under test.
sglang-test: sglang-install
	$(SGLANG)/python -m pytest tests/sglang

# Says what it ran, and how long each case took.
sglang-hybrids: sglang-install
	$(SGLANG)/python -m pytest tests/sglang/test_hybrids.py tests/sglang/test_states.py -m "long or not long" -v --durations=0

sglang-long: sglang-install
	$(SGLANG)/python -m pytest tests/sglang -m long --ignore tests/sglang/test_hybrids.py --ignore tests/sglang/test_states.py -v --durations=0

sglang-demo: sglang-install
	$(SGLANG)/python tests/sglang/demo.py $(SERVE)

sglang-install: install $(SGLANG_VENV)/.stamp $(SGLANG_VENV)/.stamp-oldest

$(SGLANG_VENV)/.stamp: tests/sglang/requirements.txt $(wildcard tests/sglang/host/*.toml tests/sglang/host/*/*.py) | $(VENV)/.stamp-tools
	test -x $(SGLANG)/python || $(BIN)/python -m venv $(SGLANG_VENV)
	$(SGLANG)/python -m pip --disable-pip-version-check --quiet install --no-deps -r tests/sglang/requirements.txt
	$(SGLANG)/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --force-reinstall \
	  tests/sglang/host
	paths='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  printf 'import site; site.addsitedir("%s")\nimport sglang_host.cpu_torch\n' "$$($(BIN)/python -c "$$paths")" \
	  > "$$($(SGLANG)/python -c "$$paths")/zz_dflash_rs_venv.pth"
	touch $@

# The oldest version supported, in a folder that its tests put in front of the newest.
$(SGLANG_VENV)/.stamp-oldest: tests/sglang/requirements-0.5.17.txt | $(SGLANG_VENV)/.stamp
	rm -rf $(SGLANG_VENV)/sglang-0.5.17
	$(SGLANG)/python -m pip --disable-pip-version-check --quiet install --no-deps --target $(SGLANG_VENV)/sglang-0.5.17 -r $<
	touch $@

bench: bench-core bench-demo bench-trees bench-coupled bench-overlap bench-rows bench-hybrid bench-peers bench-host bench-reference bench-sglang

bench-core: install venv
	cargo bench --locked
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json .benchmarks/crossing.json
	$(BIN)/python scripts/collect_results.py target/criterion .benchmarks/crossing.json benchmarks/results/core.json

bench-demo: install venv
	$(BIN)/dflash-rs bench --suite demo --concurrency 1,2,4,8 --profile \
	  --json benchmarks/results/demo.json --plot docs/img/demo.png

bench-host: install venv
	$(BIN)/python benchmarks/host_step.py --json benchmarks/results/host_step.json

bench-trees: install venv
	$(BIN)/python benchmarks/trees.py --json benchmarks/results/trees.json

bench-coupled: install venv
	$(BIN)/python benchmarks/coupled.py --json benchmarks/results/coupled.json

bench-overlap: install venv
	$(BIN)/python benchmarks/overlap.py --json benchmarks/results/overlap.json

bench-rows: install venv
	$(BIN)/python benchmarks/pass_rows.py --json benchmarks/results/pass_rows.json

bench-hybrid: install venv
	$(BIN)/dflash-rs bench --suite demo --model bundled-hybrid --threads 1 --concurrency 1,2,4,8 --profile \
	  --json benchmarks/results/hybrid_demo.json
	$(BIN)/python benchmarks/hybrid.py --json benchmarks/results/hybrid.json

# PEERS names a target and its drafters, such as PEERS="--model smollm2 --draft auto --draft runs/mtp".
PEERS ?=
bench-peers: install venv
	$(BIN)/dflash-rs bench --suite peers $(PEERS) --json benchmarks/results/peers.json --plot docs/img/peers.png

bench-sglang: sglang-install
	OMP_NUM_THREADS=1 $(SGLANG)/python benchmarks/sglang_planning.py --json benchmarks/results/sglang_planning.json
	$(SGLANG)/python benchmarks/sglang_serving.py --json benchmarks/results/sglang_serving.json
	$(SGLANG)/python benchmarks/sglang_trees.py --json benchmarks/results/sglang_trees.json
	$(SGLANG)/python benchmarks/sglang_operations.py --json benchmarks/results/sglang_operations.json

bench-reference: install venv
	$(BIN)/dflash-rs bench --suite reference --concurrency 1,4 --json benchmarks/results/reference.json

# A failure is found again by its seed and the number of lives; proptest makes it smaller and keeps it as a regression.
MINUTES ?= 10
SEED ?= 1
LIVES ?= 2000
soak:
	cargo test --locked --profile soak --test engine_model --no-run
	end=$$(($$(date +%s) + 60 * $(MINUTES))); seed=$(SEED); \
	while PROPTEST_RNG_SEED=$$seed PROPTEST_CASES=$(LIVES) cargo test --locked --profile soak --test engine_model --quiet; do \
	  seed=$$((seed + 1)); \
	  if [ $$(date +%s) -ge $$end ]; then \
	    echo "$(LIVES) lives from each of the seeds $(SEED) to $$((seed - 1)): nothing found"; exit 0; \
	  fi; \
	done; \
	echo "seed $$seed failed; again: make soak MINUTES=0 SEED=$$seed LIVES=$(LIVES)" >&2; exit 1

# Which faults, and where: docs/testing.md. MUTANTS is passed on, such as MUTANTS="--shard 1/8" or MUTANTS="--re PagePool".
MUTANTS ?=
MUTATED := src/kv src/schedule src/step src/verify src/draft src/plan src/stats.rs
mutants: mutants-tools
	failed=0; \
	$(BIN)/python scripts/mutants.py rust $(MUTATED) $(MUTANTS) || failed=1; \
	$(BIN)/python scripts/mutants.py cuda cuda/common.cuh $(wildcard cuda/logic_*.cuh) $(MUTANTS) || failed=1; \
	exit $$failed

mutants-tools: target/tools/.stamp
target/tools/.stamp: scripts/mutants-requirements.txt | $(VENV)/.stamp-venv
	cargo install cargo-mutants --locked --quiet --version 27.1.0 --root target/tools
	$(PIP) install --target target/tools/python --upgrade -r $<
	touch $@

venv: $(VENV)/.stamp-tools
install: $(VENV)/.stamp-package

$(VENV)/.stamp-venv:
	test -n "$(PYTHON)" || { echo "No Python >= 3.10 found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# What builds the package and what it runs on. Like the tools installed again only when what is asked for has changed, not
# whenever pyproject.toml has.
$(VENV)/.stamp-build: $(VENV)/.stamp-venv pyproject.toml scripts/requirements.py scripts/tested-versions.txt
	$(BIN)/python scripts/requirements.py build torch gguf structured > $(VENV)/requirements-build.new
	if ! cmp -s $(VENV)/requirements-build.new $(VENV)/requirements-build.txt; then \
	  echo "Installing $$(tr '\n' ' ' < $(VENV)/requirements-build.new)"; \
	  echo "(torch alone is a few hundred megabytes as a CPU build, several gigabytes otherwise: this takes minutes)"; \
	  $(PIP) install -r $(VENV)/requirements-build.new; \
	  mv $(VENV)/requirements-build.new $(VENV)/requirements-build.txt; \
	fi
	touch $@

# What tests and benchmarks need beside them. torch is named again so that nothing else decides its version.
$(VENV)/.stamp-tools: $(VENV)/.stamp-build pyproject.toml scripts/requirements.py scripts/tested-versions.txt
	$(BIN)/python scripts/requirements.py torch gguf structured bench dev > $(VENV)/requirements.new
	if ! cmp -s $(VENV)/requirements.new $(VENV)/requirements.txt; then \
	  echo "Installing $$(tr '\n' ' ' < $(VENV)/requirements.new)"; \
	  $(PIP) install -r $(VENV)/requirements.new; \
	  $(PIP) install --no-deps $(REFERENCE); \
	  mv $(VENV)/requirements.new $(VENV)/requirements.txt; \
	fi
	touch $@

# The touch: cargo cannot know that a build which found no compiler would now find one.
$(VENV)/.stamp-nvcc: $(VENV)/.stamp-venv scripts/nvcc-requirements.txt scripts/sass-requirements.txt
ifneq ($(DFLASH_CUDA),0)
	$(PIP) install -r scripts/nvcc-requirements.txt -r scripts/sass-requirements.txt
	touch build.rs
endif
	touch $@

# The removal: a wheel that is there was linked otherwise. Other systems have no manylinux.
$(VENV)/.stamp-zig: $(VENV)/.stamp-venv scripts/zig-requirements.txt
ifeq ($(shell uname -s),Linux)
	$(PIP) install -r scripts/zig-requirements.txt
	rm -f $(VENV)/.stamp-wheel
endif
	touch $@

# maturin looks for zig on PATH.
$(VENV)/.stamp-wheel: $(VENV)/.stamp-build $(PACKAGE_SOURCES)
	rm -rf dist
	@echo "Compiling the extension (a few minutes the first time)"
	zig=""; if $(BIN)/python -c "import ziglang" 2>/dev/null; then zig="--zig --compatibility manylinux_2_28"; fi; \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --locked --quiet --interpreter $(BIN)/python --out dist $$zig
	touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-wheel
	$(PIP) install --force-reinstall --no-deps dist/*.whl
	touch $@

clean:
	rm -rf target dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks tests/sglang/host/build tests/sglang/host/*.egg-info
	rm -f $(VENV)/.stamp-package $(VENV)/.stamp-wheel

distclean: clean
	rm -rf $(VENV) $(SGLANG_VENV)
