CREATE FUNCTION public.trunkline_append_only() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION '% is append-only: no %', TG_TABLE_NAME, TG_OP; END $$;

CREATE TABLE public.adapter_versions (
    run_id text NOT NULL,
    number integer NOT NULL,
    client_sha256 text NOT NULL,
    trunk_sha256 text NOT NULL,
    trained_tokens bigint NOT NULL,
    created_at timestamp with time zone NOT NULL
);

CREATE TABLE public.clients (
    node_id text NOT NULL,
    name text,
    first_seen_at timestamp with time zone NOT NULL
);

CREATE TABLE public.events (
    event_id bigint NOT NULL,
    run_id text,
    kind text NOT NULL,
    message text NOT NULL,
    detail json NOT NULL,
    at timestamp with time zone NOT NULL
);

CREATE SEQUENCE public.events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER SEQUENCE public.events_event_id_seq OWNED BY public.events.event_id;

CREATE TABLE public.identities (
    client_id text NOT NULL,
    public_key text NOT NULL,
    enrolled_at timestamp with time zone NOT NULL,
    enrolled_by text NOT NULL,
    revoked_at timestamp with time zone,
    revoke_reason text,
    roster_version bigint NOT NULL
);

CREATE TABLE public.metrics (
    run_id text NOT NULL,
    number integer NOT NULL,
    attempt integer NOT NULL,
    node_id text NOT NULL,
    name text NOT NULL,
    value double precision NOT NULL,
    recorded_at timestamp with time zone NOT NULL
);

CREATE TABLE public.node_bindings (
    node_id text NOT NULL,
    run_id text NOT NULL,
    client_id text NOT NULL,
    bound_at timestamp with time zone NOT NULL,
    signature text NOT NULL
);

CREATE TABLE public.participations (
    run_id text NOT NULL,
    number integer NOT NULL,
    attempt integer NOT NULL,
    node_id text NOT NULL,
    status text NOT NULL,
    reason text
);

CREATE TABLE public.privacy_heads (
    source text NOT NULL,
    unit_id text NOT NULL,
    signer text NOT NULL,
    seq bigint NOT NULL,
    run text NOT NULL,
    round bigint NOT NULL,
    attempt bigint NOT NULL,
    hash text NOT NULL,
    signature text NOT NULL,
    at text NOT NULL
);

CREATE TABLE public.privacy_rows (
    unit_id text NOT NULL,
    seq bigint NOT NULL,
    kind text NOT NULL,
    client text NOT NULL,
    dataset text NOT NULL,
    level text NOT NULL,
    run text NOT NULL,
    round bigint NOT NULL,
    attempt bigint NOT NULL,
    channel text NOT NULL,
    mechanism text NOT NULL,
    parameters text NOT NULL,
    sampling text NOT NULL,
    adjacency text NOT NULL,
    release text NOT NULL,
    accountant text NOT NULL,
    state text NOT NULL,
    operator text NOT NULL,
    reason text NOT NULL,
    at text NOT NULL,
    previous text NOT NULL,
    hash text NOT NULL
);

CREATE TABLE public.privacy_tallies (
    unit_id text NOT NULL,
    run text NOT NULL,
    release text NOT NULL,
    count bigint NOT NULL
);

CREATE TABLE public.privacy_units (
    unit_id text NOT NULL,
    client text NOT NULL,
    dataset text NOT NULL,
    level text NOT NULL,
    seq bigint NOT NULL,
    hash text NOT NULL
);

CREATE TABLE public.roster (
    roster_id integer NOT NULL,
    version bigint NOT NULL,
    CONSTRAINT ck_roster_ck_roster_one CHECK ((roster_id = 1))
);

CREATE TABLE public.rounds (
    run_id text NOT NULL,
    number integer NOT NULL,
    attempt integer NOT NULL,
    status text NOT NULL,
    reason text,
    phase text NOT NULL,
    replies integer NOT NULL,
    steps bigint NOT NULL,
    tokens bigint NOT NULL,
    received_bytes bigint NOT NULL,
    sent_bytes bigint NOT NULL,
    trained_tokens bigint NOT NULL,
    seconds double precision,
    phase_seconds json NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    progress_at timestamp with time zone NOT NULL,
    ended_at timestamp with time zone,
    threshold bigint
);

CREATE TABLE public.runs (
    run_id text NOT NULL,
    flower_run_id text NOT NULL,
    mode text NOT NULL,
    status text NOT NULL,
    reason text,
    config json NOT NULL,
    model_fingerprint text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    ended_at timestamp with time zone,
    lease_until timestamp with time zone
);

CREATE TABLE public.trunkline_schema (
    version_num character varying(32) NOT NULL
);

ALTER TABLE ONLY public.events ALTER COLUMN event_id SET DEFAULT nextval('public.events_event_id_seq'::regclass);

INSERT INTO public.adapter_versions VALUES ('20261101-000000-0001', 0, 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 0, '2026-11-01 00:00:02+00');
INSERT INTO public.adapter_versions VALUES ('20261101-000000-0001', 1, 'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc', 'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd', 1000, '2026-11-01 00:00:07+00');

INSERT INTO public.clients VALUES ('11', 'north', '2026-11-01 00:00:03+00');
INSERT INTO public.clients VALUES ('12', NULL, '2026-11-01 00:00:05+00');

INSERT INTO public.events VALUES (1, '20261101-000000-0001', 'adapter-structure', 'LoRA on 7 modules', '{"rank": 8}', '2026-11-01 00:00:11+00');
INSERT INTO public.events VALUES (2, NULL, 'client-enrolled', 'ada enrolled client ward', '{"client_id": "ward", "public_key": "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=", "operator": "ada", "roster_version": 1}', '2026-11-01 00:00:12+00');

INSERT INTO public.identities VALUES ('ward', 'ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=', '2026-11-01 00:00:12+00', 'ada', NULL, NULL, 1);

INSERT INTO public.metrics VALUES ('20261101-000000-0001', 1, 1, '11', 'train_loss', 3.5, '2026-11-01 00:00:06+00');
INSERT INTO public.metrics VALUES ('20261101-000000-0001', 1, 1, '', 'eval_loss', 3.25, '2026-11-01 00:00:08+00');

INSERT INTO public.participations VALUES ('20261101-000000-0001', 1, 1, '11', 'trained', NULL);
INSERT INTO public.participations VALUES ('20261101-000000-0001', 1, 1, '12', 'trained', NULL);
INSERT INTO public.participations VALUES ('20261101-000000-0001', 2, 1, '11', 'invited', NULL);
INSERT INTO public.participations VALUES ('20261101-000000-0001', 2, 1, '12', 'invited', NULL);

INSERT INTO public.privacy_rows VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 1, 'budget', 'ward', 'notes', 'client', '', 1, 0, 'budget', '', '{"delta":"0x1.4f8b588e368f1p-17","epsilon":"0x1.0000000000000p+3","gaussian_share":{"holder":"0x1.999999999999ap-4","trunk":"0x1.0000000000000p+0"},"order":"0x1.9000000000000p+3"}', '', '', '', '', 'SET', 'ada', 'agreed', '2026-11-01T00:00:01.000000+00:00', '4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', '340206635cf7bf2558be847e55479ee93b7ba45035818a4f28a1f8fe0d4ac9b8');
INSERT INTO public.privacy_rows VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 2, 'charge', 'ward', 'notes', 'client', 'r1', 1, 1, 'adapter_sum', 'gaussian', '{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}', '{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}', '{"holder":"zero-out","orchestrator":"zero-out"}', '["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]', 'test 1', 'RESERVED', '', '', '2026-11-01T00:00:02.000000+00:00', '340206635cf7bf2558be847e55479ee93b7ba45035818a4f28a1f8fe0d4ac9b8', 'fa31bb1466070254fcdb2694f862b28b1541e245308a17eca971689bcd3a8711');
INSERT INTO public.privacy_rows VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 3, 'charge', 'ward', 'notes', 'client', 'r1', 1, 1, 'adapter_sum', 'gaussian', '{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}', '{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}', '{"holder":"zero-out","orchestrator":"zero-out"}', '["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]', 'test 1', 'COMMITTED', '', '', '2026-11-01T00:00:03.000000+00:00', 'fa31bb1466070254fcdb2694f862b28b1541e245308a17eca971689bcd3a8711', 'd3064ebd935dde32d22e1c566b6c37ead53dec5920318af267f6afc49bfeb590');
INSERT INTO public.privacy_rows VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 4, 'charge', 'ward', 'notes', 'client', 'r1', 2, 1, 'adapter_sum', 'gaussian', '{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}', '{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}', '{"holder":"zero-out","orchestrator":"zero-out"}', '["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]', 'test 1', 'RESERVED', '', '', '2026-11-01T00:00:04.000000+00:00', 'd3064ebd935dde32d22e1c566b6c37ead53dec5920318af267f6afc49bfeb590', '27394805d4b876eb1021740dfeba03832196be07014d0ba62f97304b38bf7c99');

INSERT INTO public.privacy_tallies VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 'r1', '["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]', 2);

INSERT INTO public.privacy_units VALUES ('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd', 'ward', 'notes', 'client', 4, '27394805d4b876eb1021740dfeba03832196be07014d0ba62f97304b38bf7c99');

INSERT INTO public.roster VALUES (1, 1);

INSERT INTO public.rounds VALUES ('20261101-000000-0001', 1, 1, 'committed', NULL, 'committed', 2, 0, 0, 0, 0, 1000, 2.5, '{"training": 2.0}', '2026-11-01 00:00:04+00', '2026-11-01 00:00:07+00', '2026-11-01 00:00:07+00', NULL);
INSERT INTO public.rounds VALUES ('20261101-000000-0001', 2, 1, 'open', NULL, 'open', 0, 0, 0, 0, 0, 0, NULL, '{}', '2026-11-01 00:00:09+00', '2026-11-01 00:00:09+00', NULL, NULL);

INSERT INTO public.runs VALUES ('20261101-000000-0001', '4711', 'simulation', 'running', NULL, '{"num-rounds": 3, "secagg": "off"}', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', '2026-11-01 00:00:01+00', NULL, '2026-11-01 00:00:21+00');

INSERT INTO public.trunkline_schema VALUES ('0005');

SELECT pg_catalog.setval('public.events_event_id_seq', 2, true);

ALTER TABLE ONLY public.adapter_versions
    ADD CONSTRAINT pk_adapter_versions PRIMARY KEY (run_id, number);

ALTER TABLE ONLY public.clients
    ADD CONSTRAINT pk_clients PRIMARY KEY (node_id);

ALTER TABLE ONLY public.events
    ADD CONSTRAINT pk_events PRIMARY KEY (event_id);

ALTER TABLE ONLY public.identities
    ADD CONSTRAINT pk_identities PRIMARY KEY (client_id);

ALTER TABLE ONLY public.metrics
    ADD CONSTRAINT pk_metrics PRIMARY KEY (run_id, number, attempt, node_id, name);

ALTER TABLE ONLY public.node_bindings
    ADD CONSTRAINT pk_node_bindings PRIMARY KEY (node_id, run_id, client_id);

ALTER TABLE ONLY public.participations
    ADD CONSTRAINT pk_participations PRIMARY KEY (run_id, number, attempt, node_id);

ALTER TABLE ONLY public.privacy_heads
    ADD CONSTRAINT pk_privacy_heads PRIMARY KEY (source, unit_id, signer, seq, run, round, attempt);

ALTER TABLE ONLY public.privacy_rows
    ADD CONSTRAINT pk_privacy_rows PRIMARY KEY (unit_id, seq);

ALTER TABLE ONLY public.privacy_tallies
    ADD CONSTRAINT pk_privacy_tallies PRIMARY KEY (unit_id, run, release);

ALTER TABLE ONLY public.privacy_units
    ADD CONSTRAINT pk_privacy_units PRIMARY KEY (unit_id);

ALTER TABLE ONLY public.roster
    ADD CONSTRAINT pk_roster PRIMARY KEY (roster_id);

ALTER TABLE ONLY public.rounds
    ADD CONSTRAINT pk_rounds PRIMARY KEY (run_id, number, attempt);

ALTER TABLE ONLY public.runs
    ADD CONSTRAINT pk_runs PRIMARY KEY (run_id);

ALTER TABLE ONLY public.trunkline_schema
    ADD CONSTRAINT trunkline_schema_pkc PRIMARY KEY (version_num);

ALTER TABLE ONLY public.identities
    ADD CONSTRAINT uq_identities_public_key UNIQUE (public_key);

ALTER TABLE ONLY public.privacy_rows
    ADD CONSTRAINT uq_privacy_rows_charge UNIQUE (unit_id, run, round, attempt, channel, state);

CREATE INDEX ix_events_run_id_event_id ON public.events USING btree (run_id, event_id);

CREATE INDEX ix_participations_node_id ON public.participations USING btree (node_id);

CREATE INDEX ix_privacy_rows_run_round_attempt ON public.privacy_rows USING btree (run, round, attempt);

CREATE INDEX ix_privacy_units_client_level ON public.privacy_units USING btree (client, level);

CREATE INDEX ix_runs_created_at ON public.runs USING btree (created_at);

CREATE INDEX ix_runs_flower_run_id ON public.runs USING btree (flower_run_id);

CREATE UNIQUE INDEX uq_rounds_committed ON public.rounds USING btree (run_id, number) WHERE (status = 'committed'::text);

CREATE UNIQUE INDEX uq_rounds_open ON public.rounds USING btree (run_id) WHERE (status = 'open'::text);

CREATE TRIGGER privacy_heads_no_delete BEFORE DELETE ON public.privacy_heads FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

CREATE TRIGGER privacy_heads_no_truncate BEFORE TRUNCATE ON public.privacy_heads FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

CREATE TRIGGER privacy_heads_no_update BEFORE UPDATE ON public.privacy_heads FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

CREATE TRIGGER privacy_rows_no_delete BEFORE DELETE ON public.privacy_rows FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

CREATE TRIGGER privacy_rows_no_truncate BEFORE TRUNCATE ON public.privacy_rows FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

CREATE TRIGGER privacy_rows_no_update BEFORE UPDATE ON public.privacy_rows FOR EACH STATEMENT EXECUTE FUNCTION public.trunkline_append_only();

ALTER TABLE ONLY public.adapter_versions
    ADD CONSTRAINT fk_adapter_versions_runs FOREIGN KEY (run_id) REFERENCES public.runs(run_id);

ALTER TABLE ONLY public.events
    ADD CONSTRAINT fk_events_runs FOREIGN KEY (run_id) REFERENCES public.runs(run_id);

ALTER TABLE ONLY public.metrics
    ADD CONSTRAINT fk_metrics_runs FOREIGN KEY (run_id) REFERENCES public.runs(run_id);

ALTER TABLE ONLY public.node_bindings
    ADD CONSTRAINT fk_node_bindings_identities FOREIGN KEY (client_id) REFERENCES public.identities(client_id);

ALTER TABLE ONLY public.node_bindings
    ADD CONSTRAINT fk_node_bindings_runs FOREIGN KEY (run_id) REFERENCES public.runs(run_id);

ALTER TABLE ONLY public.participations
    ADD CONSTRAINT fk_participations_clients FOREIGN KEY (node_id) REFERENCES public.clients(node_id);

ALTER TABLE ONLY public.participations
    ADD CONSTRAINT fk_participations_rounds FOREIGN KEY (run_id, number, attempt) REFERENCES public.rounds(run_id, number, attempt);

ALTER TABLE ONLY public.privacy_rows
    ADD CONSTRAINT fk_privacy_rows_privacy_units FOREIGN KEY (unit_id) REFERENCES public.privacy_units(unit_id);

ALTER TABLE ONLY public.privacy_tallies
    ADD CONSTRAINT fk_privacy_tallies_privacy_units FOREIGN KEY (unit_id) REFERENCES public.privacy_units(unit_id);

ALTER TABLE ONLY public.rounds
    ADD CONSTRAINT fk_rounds_runs FOREIGN KEY (run_id) REFERENCES public.runs(run_id);
