PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# NVIDIA Triton, for the tests of served models. Its Python backend loads the system's libpython.
SERVER ?= .venv-server
SERVER_PYTHON ?= /usr/bin/python3
SERVER_STAMP = $(SERVER)/.installed
# A device with the oldest OpenVINO and ONNX Runtime that are promised, and nothing of the export extra.
OLD_OPENVINO ?= .venv-old-openvino
OLD_OPENVINO_STAMP = $(OLD_OPENVINO)/.installed
# Ray, for the example in examples/ray; the other libraries are those of the first environment.
RAY ?= .venv-ray
RAY_STAMP = $(RAY)/.installed
# The verifier of OpenSSF Model Signing, which has to accept a signed bundle.
MODEL_SIGNING ?= .venv-model-signing
MODEL_SIGNING_STAMP = $(MODEL_SIGNING)/.installed
# Of Debian's archive, unpacked and not installed: ONNX Runtime's C headers, which its wheel has not, a client of container
# registries and a registry. The release is one that has them all; its address is that of this machine's packages.
DEBIAN ?= .debian
DEBIAN_RELEASE ?= trixie
DEBIAN_PACKAGES = libonnxruntime-dev oras docker-registry
DEBIAN_STAMP = $(DEBIAN)/.unpacked

# Every library in the lowest version that pyproject.toml promises, on the lowest Python.
LOWEST ?= .venv-lowest
LOWEST_PYTHON ?= python3.10
LOWEST_STAMP = $(LOWEST)/.installed

# Pythons of pyenv are found by their names too; its own commands of these names fail where no version is chosen.
EMPTY :=
PYENV = $(subst $(EMPTY) $(EMPTY),:,$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin))
WITH_PYENV = PATH="$(PYENV):$$PATH"

.PHONY: install server-env old-openvino-env model-signing-env ray-env debian-tools lowest-env demo test test-fast test-lowest matrix first-hour check schemas docs archives dist fix

install: $(STAMP)

# The stubs' metadata asks for TensorRT itself, which type checking does not need.
$(STAMP): pyproject.toml setup.py fcos_deploy/core/c/host.c constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev,docs,serving,tensorrt-rtx]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps tensorrt-stubs
	touch $@

server-env: $(SERVER_STAMP)

$(SERVER_STAMP): tests/data/serving/requirements.txt
	$(SERVER_PYTHON) -m venv $(SERVER)
	$(SERVER)/bin/pip install --quiet --no-deps -r $<
	touch $@

old-openvino-env: $(OLD_OPENVINO_STAMP)

$(OLD_OPENVINO_STAMP): pyproject.toml
	$(PYTHON) -m venv $(OLD_OPENVINO)
	$(OLD_OPENVINO)/bin/pip install --quiet openvino==2025.0.0 onnxruntime==1.17.3 'numpy<2' '.[sign]'
	$(OLD_OPENVINO)/bin/pip uninstall --quiet --yes fcos-deploy
	touch $@

model-signing-env: $(MODEL_SIGNING_STAMP)

$(MODEL_SIGNING_STAMP): Makefile
	$(PYTHON) -m venv $(MODEL_SIGNING)
	$(MODEL_SIGNING)/bin/pip install --quiet model-signing==1.1.1 pyOpenSSL
	touch $@

ray-env: $(RAY_STAMP)

$(RAY_STAMP): $(STAMP) Makefile
	$(BIN)/python -m venv $(RAY)
	$(RAY)/bin/pip install --quiet ray==2.60.0
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/fcos-deploy.pth
	touch $@

debian-tools: $(DEBIAN_STAMP)

APT = apt-get -qq -o Dir::Etc::SourceList=$(abspath $(DEBIAN))/sources.list -o Dir::Etc::SourceParts=/dev/null \
	-o Dir::State::Lists=$(abspath $(DEBIAN))/lists -o Dir::Cache=$(abspath $(DEBIAN))/cache -o APT::Sandbox::User=root

$(DEBIAN_STAMP): Makefile
	rm -rf $(DEBIAN)
	mkdir -p $(DEBIAN)/lists/partial $(DEBIAN)/cache/archives/partial
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
		"$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' 'Component: main' | head -n 1)" \
		"$(DEBIAN_RELEASE) main" > $(DEBIAN)/sources.list
	$(APT) update
	cd $(DEBIAN) && $(APT) download $(DEBIAN_PACKAGES)
	for package in $(DEBIAN)/*.deb; do dpkg-deb -x $$package $(DEBIAN) || exit 1; done
	rm -rf $(DEBIAN)/lists $(DEBIAN)/cache $(DEBIAN)/*.deb
	touch $@

lowest-env: $(LOWEST_STAMP)

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt
	$(WITH_PYENV) $(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e '.[all,serving]' \
		pytest pytest-timeout pytest-xdist hypothesis jsonschema filelock safetensors
	touch $@

# One more than this machine's cores: some tests wait for servers, streams and processes.
WORKERS ?= 3

demo: $(STAMP)
	$(BIN)/fcos-deploy demo -o runs/demo

test: $(STAMP)
	FCOS_DEPLOY_REQUIRE=pytorch,onnxruntime,openvino$(REQUIRE_MORE) \
	FCOS_DEPLOY_TRITON_PYTHON=$(wildcard $(abspath $(SERVER))/bin/python) \
	FCOS_DEPLOY_MODEL_SIGNING_PYTHON=$(wildcard $(abspath $(MODEL_SIGNING))/bin/python) \
	FCOS_DEPLOY_RAY_PYTHON=$(wildcard $(abspath $(RAY))/bin/python) \
	FCOS_DEPLOY_DEBIAN_TOOLS=$(and $(wildcard $(DEBIAN_STAMP)),$(abspath $(DEBIAN))/usr) \
	FCOS_DEPLOY_OLD_OPENVINO_PYTHON=$(wildcard $(abspath $(OLD_OPENVINO))/bin/python) \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow' -q

# Old libraries warn of what newer ones drop; that is no error here.
test-lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -W default -m 'not slow' -q tests/unit tests/contract tests/cli

# What a device runs, without torch, on every Python that is named and found; each in an environment of its own.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
MATRIX ?= .venv-matrix
MATRIX_TESTS = $(addprefix tests/unit/test_,preprocess.py decode.py detections.py gate.py serialize.py \
	files.py image_io.py checkpoint_options.py) tests/cli/test_settings.py

matrix:
	for python in $(PYTHONS); do \
		$(WITH_PYENV) $$python -c '' 2> /dev/null || { echo "$$python: not here"; continue; }; \
		$(WITH_PYENV) $$python -m venv --clear $(MATRIX) && \
		$(MATRIX)/bin/pip install --quiet '.[onnxruntime,eval,sign]' pytest pytest-timeout hypothesis jsonschema filelock && \
		echo "$$python: $$($(MATRIX)/bin/python --version)" && \
		$(MATRIX)/bin/python -m pytest -q -W default -m 'not slow' $(MATRIX_TESTS) || exit 1; \
	done

# Repeats what docs/first-hour.md shows, in bare environments below runs/ (8 GB), and writes it into the page.
first-hour: $(STAMP)
	$(WITH_PYENV) $(abspath $(BIN))/python docs/first_hour.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into docs/_build/html; a broken link or reference is an error.
schemas: $(STAMP)
	$(BIN)/python docs/schema/generate.py

docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# Source archive and wheels, the same bytes from the same commit: built twice and compared, checked, and each installed
# where nothing else is. A wheel for each kind of machine has the compiled host path; the one for any machine does
# without. zig compiles for all of them, against the C library of manylinux2014; -I keeps it from the environment in
# which pip builds.
EPOCH = $(shell git log -1 --format=%ct)
REPACK = tar --sort=name --mtime=@$(EPOCH) --owner=0 --group=0 --numeric-owner --mode=u+rw,go=rX -cf -
ZIG = $(abspath $(BIN))/python -I -m ziglang cc -target
WHEEL = SOURCE_DATE_EPOCH=$(EPOCH) $(BIN)/pip wheel --quiet --no-deps --wheel-dir $(FOLDER)
BUILDS = dist dist/again
INSTALLED = cd dist && bare/bin/fcos-deploy --version && bare/bin/fcos-deploy doctor > /dev/null 2>&1

archives: $(STAMP)
	SOURCE_DATE_EPOCH=$(EPOCH) $(BIN)/python -m build --sdist --outdir $(FOLDER) . > /dev/null
	cd $(FOLDER) && tar -xzf *.tar.gz && $(REPACK) fcos_deploy-*/ | gzip -9n > packed && mv packed *.tar.gz && \
		rm -r fcos_deploy-*/
	FCOS_DEPLOY_NATIVE=0 $(WHEEL) $(FOLDER)/*.tar.gz & builds=$$!; \
	for machine in x86_64 aarch64; do \
		FCOS_DEPLOY_NATIVE=1 CC="$(ZIG) $$machine-linux-gnu.2.17" $(WHEEL) $(FOLDER)/*.tar.gz \
			--config-settings=--build-option=--plat-name=manylinux2014_$$machine & builds="$$builds $$!"; \
	done; \
	for build in $$builds; do wait $$build || exit 1; done
	cd $(FOLDER) && sha256sum *.tar.gz *.whl > SHA256SUMS

dist: $(STAMP)
	rm -rf dist
	for folder in $(BUILDS); do $(MAKE) --no-print-directory archives FOLDER=$$folder || exit 1; done
	diff dist/SHA256SUMS dist/again/SHA256SUMS
	rm -r dist/again
	$(BIN)/python -m twine check --strict dist/*.tar.gz dist/*.whl
	$(PYTHON) -m venv dist/bare
	dist/bare/bin/pip install --quiet dist/*.tar.gz
	$(INSTALLED)
	$(PYTHON) -m venv --clear dist/bare
	dist/bare/bin/pip install --quiet dist/*-any.whl
	$(INSTALLED)
	dist/bare/bin/pip install --quiet --no-deps --force-reinstall dist/*_$$(uname -m).whl
	cd dist && FCOS_DEPLOY_NATIVE=1 bare/bin/python -c 'from fcos_deploy.core.native import native; native()'
	rm -r dist/bare
	cat dist/SHA256SUMS

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
