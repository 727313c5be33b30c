BEGIN TRANSACTION;
CREATE TABLE adapter_versions (
	run_id TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	client_sha256 TEXT NOT NULL, 
	trunk_sha256 TEXT NOT NULL, 
	trained_tokens BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_adapter_versions PRIMARY KEY (run_id, number), 
	CONSTRAINT fk_adapter_versions_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "adapter_versions" VALUES('20261101-000000-0001',0,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',0,'2026-11-01 00:00:02.000000');
INSERT INTO "adapter_versions" VALUES('20261101-000000-0001',1,'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',1000,'2026-11-01 00:00:07.000000');
CREATE TABLE clients (
	node_id TEXT NOT NULL, 
	name TEXT, 
	first_seen_at DATETIME NOT NULL, 
	CONSTRAINT pk_clients PRIMARY KEY (node_id)
);
INSERT INTO "clients" VALUES('11','north','2026-11-01 00:00:03.000000');
INSERT INTO "clients" VALUES('12',NULL,'2026-11-01 00:00:05.000000');
CREATE TABLE events (
	event_id INTEGER NOT NULL, 
	run_id TEXT, 
	kind TEXT NOT NULL, 
	message TEXT NOT NULL, 
	detail JSON NOT NULL, 
	at DATETIME NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (event_id), 
	CONSTRAINT fk_events_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "events" VALUES(1,'20261101-000000-0001','adapter-structure','LoRA on 7 modules','{"rank": 8}','2026-11-01 00:00:11.000000');
INSERT INTO "events" VALUES(2,NULL,'client-enrolled','ada enrolled client ward','{"client_id": "ward", "public_key": "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=", "operator": "ada", "roster_version": 1}','2026-11-01 00:00:12.000000');
CREATE TABLE identities (
	client_id TEXT NOT NULL, 
	public_key TEXT NOT NULL, 
	enrolled_at DATETIME NOT NULL, 
	enrolled_by TEXT NOT NULL, 
	revoked_at DATETIME, 
	revoke_reason TEXT, 
	roster_version BIGINT NOT NULL, 
	CONSTRAINT pk_identities PRIMARY KEY (client_id), 
	CONSTRAINT uq_identities_public_key UNIQUE (public_key)
);
INSERT INTO "identities" VALUES('ward','ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=','2026-11-01 00:00:12.000000','ada',NULL,NULL,1);
CREATE TABLE metrics (
	run_id TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	node_id TEXT NOT NULL, 
	name TEXT NOT NULL, 
	value DOUBLE NOT NULL, 
	recorded_at DATETIME NOT NULL, 
	CONSTRAINT pk_metrics PRIMARY KEY (run_id, number, attempt, node_id, name), 
	CONSTRAINT fk_metrics_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "metrics" VALUES('20261101-000000-0001',1,1,'11','train_loss',3.5,'2026-11-01 00:00:06.000000');
INSERT INTO "metrics" VALUES('20261101-000000-0001',1,1,'','eval_loss',3.25,'2026-11-01 00:00:08.000000');
CREATE TABLE node_bindings (
	node_id TEXT NOT NULL, 
	run_id TEXT NOT NULL, 
	client_id TEXT NOT NULL, 
	bound_at DATETIME NOT NULL, 
	signature TEXT NOT NULL, 
	CONSTRAINT pk_node_bindings PRIMARY KEY (node_id, run_id, client_id), 
	CONSTRAINT fk_node_bindings_runs FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT fk_node_bindings_identities FOREIGN KEY(client_id) REFERENCES identities (client_id)
);
CREATE TABLE participations (
	run_id TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	node_id TEXT NOT NULL, 
	status TEXT NOT NULL, 
	reason TEXT, 
	CONSTRAINT pk_participations PRIMARY KEY (run_id, number, attempt, node_id), 
	CONSTRAINT fk_participations_rounds FOREIGN KEY(run_id, number, attempt) REFERENCES rounds (run_id, number, attempt), 
	CONSTRAINT fk_participations_clients FOREIGN KEY(node_id) REFERENCES clients (node_id)
);
INSERT INTO "participations" VALUES('20261101-000000-0001',1,1,'11','trained',NULL);
INSERT INTO "participations" VALUES('20261101-000000-0001',1,1,'12','trained',NULL);
INSERT INTO "participations" VALUES('20261101-000000-0001',2,1,'11','invited',NULL);
INSERT INTO "participations" VALUES('20261101-000000-0001',2,1,'12','invited',NULL);
CREATE TABLE roster (
	roster_id INTEGER NOT NULL, 
	version BIGINT NOT NULL, 
	CONSTRAINT pk_roster PRIMARY KEY (roster_id), 
	CONSTRAINT ck_roster_ck_roster_one CHECK (roster_id = 1)
);
INSERT INTO "roster" VALUES(1,1);
CREATE TABLE rounds (
	run_id TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	status TEXT NOT NULL, 
	reason TEXT, 
	phase TEXT NOT NULL, 
	replies INTEGER NOT NULL, 
	steps BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	received_bytes BIGINT NOT NULL, 
	sent_bytes BIGINT NOT NULL, 
	trained_tokens BIGINT NOT NULL, 
	seconds DOUBLE, 
	phase_seconds JSON NOT NULL, 
	opened_at DATETIME NOT NULL, 
	progress_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	CONSTRAINT pk_rounds PRIMARY KEY (run_id, number, attempt), 
	CONSTRAINT fk_rounds_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "rounds" VALUES('20261101-000000-0001',1,1,'committed',NULL,'committed',2,0,0,0,0,1000,2.5,'{"training": 2.0}','2026-11-01 00:00:04.000000','2026-11-01 00:00:07.000000','2026-11-01 00:00:07.000000');
INSERT INTO "rounds" VALUES('20261101-000000-0001',2,1,'open',NULL,'open',0,0,0,0,0,0,NULL,'{}','2026-11-01 00:00:09.000000','2026-11-01 00:00:09.000000',NULL);
CREATE TABLE runs (
	run_id TEXT NOT NULL, 
	flower_run_id TEXT NOT NULL, 
	mode TEXT NOT NULL, 
	status TEXT NOT NULL, 
	reason TEXT, 
	config JSON NOT NULL, 
	model_fingerprint TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	CONSTRAINT pk_runs PRIMARY KEY (run_id)
);
INSERT INTO "runs" VALUES('20261101-000000-0001','4711','simulation','running',NULL,'{"num-rounds": 3, "secagg": "off"}','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','2026-11-01 00:00:01.000000',NULL);
CREATE TABLE trunkline_schema (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT trunkline_schema_pkc PRIMARY KEY (version_num)
);
INSERT INTO "trunkline_schema" VALUES('0002');
CREATE INDEX ix_runs_created_at ON runs (created_at);
CREATE INDEX ix_runs_flower_run_id ON runs (flower_run_id);
CREATE UNIQUE INDEX uq_rounds_open ON rounds (run_id) WHERE status = 'open';
CREATE UNIQUE INDEX uq_rounds_committed ON rounds (run_id, number) WHERE status = 'committed';
CREATE INDEX ix_participations_node_id ON participations (node_id);
CREATE INDEX ix_events_run_id_event_id ON events (run_id, event_id);
COMMIT;
