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
CREATE TABLE privacy_heads (
	source TEXT NOT NULL, 
	unit_id TEXT NOT NULL, 
	signer TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	run TEXT NOT NULL, 
	round BIGINT NOT NULL, 
	attempt BIGINT NOT NULL, 
	hash TEXT NOT NULL, 
	signature TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_privacy_heads PRIMARY KEY (source, unit_id, signer, seq, run, round, attempt)
);
CREATE TABLE privacy_rows (
	unit_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	kind TEXT NOT NULL, 
	client TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	level TEXT NOT NULL, 
	run TEXT NOT NULL, 
	round BIGINT NOT NULL, 
	attempt BIGINT NOT NULL, 
	channel TEXT NOT NULL, 
	mechanism TEXT NOT NULL, 
	parameters TEXT NOT NULL, 
	sampling TEXT NOT NULL, 
	adjacency TEXT NOT NULL, 
	release TEXT NOT NULL, 
	accountant TEXT NOT NULL, 
	state TEXT NOT NULL, 
	operator TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	at TEXT NOT NULL, 
	previous TEXT NOT NULL, 
	hash TEXT NOT NULL, 
	CONSTRAINT pk_privacy_rows PRIMARY KEY (unit_id, seq), 
	CONSTRAINT fk_privacy_rows_privacy_units FOREIGN KEY(unit_id) REFERENCES privacy_units (unit_id), 
	CONSTRAINT uq_privacy_rows_charge UNIQUE (unit_id, run, round, attempt, channel, state)
);
INSERT INTO "privacy_rows" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd',1,'budget','ward','notes','client','',1,0,'budget','','{"delta":"0x1.4f8b588e368f1p-17","epsilon":"0x1.0000000000000p+3","gaussian_share":{"holder":"0x1.999999999999ap-4","trunk":"0x1.0000000000000p+0"},"order":"0x1.9000000000000p+3"}','','','','','SET','ada','agreed','2026-11-01T00:00:01.000000+00:00','4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd','340206635cf7bf2558be847e55479ee93b7ba45035818a4f28a1f8fe0d4ac9b8');
INSERT INTO "privacy_rows" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd',2,'charge','ward','notes','client','r1',1,1,'adapter_sum','gaussian','{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}','{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}','{"holder":"zero-out","orchestrator":"zero-out"}','["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]','test 1','RESERVED','','','2026-11-01T00:00:02.000000+00:00','340206635cf7bf2558be847e55479ee93b7ba45035818a4f28a1f8fe0d4ac9b8','fa31bb1466070254fcdb2694f862b28b1541e245308a17eca971689bcd3a8711');
INSERT INTO "privacy_rows" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd',3,'charge','ward','notes','client','r1',1,1,'adapter_sum','gaussian','{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}','{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}','{"holder":"zero-out","orchestrator":"zero-out"}','["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]','test 1','COMMITTED','','','2026-11-01T00:00:03.000000+00:00','fa31bb1466070254fcdb2694f862b28b1541e245308a17eca971689bcd3a8711','d3064ebd935dde32d22e1c566b6c37ead53dec5920318af267f6afc49bfeb590');
INSERT INTO "privacy_rows" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd',4,'charge','ward','notes','client','r1',2,1,'adapter_sum','gaussian','{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}','{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}','{"holder":"zero-out","orchestrator":"zero-out"}','["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]','test 1','RESERVED','','','2026-11-01T00:00:04.000000+00:00','d3064ebd935dde32d22e1c566b6c37ead53dec5920318af267f6afc49bfeb590','27394805d4b876eb1021740dfeba03832196be07014d0ba62f97304b38bf7c99');
CREATE TABLE privacy_tallies (
	unit_id TEXT NOT NULL, 
	run TEXT NOT NULL, 
	release TEXT NOT NULL, 
	count BIGINT NOT NULL, 
	CONSTRAINT pk_privacy_tallies PRIMARY KEY (unit_id, run, release), 
	CONSTRAINT fk_privacy_tallies_privacy_units FOREIGN KEY(unit_id) REFERENCES privacy_units (unit_id)
);
INSERT INTO "privacy_tallies" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd','r1','["adapter_sum","gaussian",{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"},{"holder":[10,"1","zero-out"],"orchestrator":[10,"0x1.999999999999ap-5","zero-out"]}]',2);
CREATE TABLE privacy_units (
	unit_id TEXT NOT NULL, 
	client TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	level TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	hash TEXT NOT NULL, 
	CONSTRAINT pk_privacy_units PRIMARY KEY (unit_id)
);
INSERT INTO "privacy_units" VALUES('4575a64b8248d66d174dfb63eb29abecf6400edc45593365e157250e4c7bb3dd','ward','notes','client',4,'27394805d4b876eb1021740dfeba03832196be07014d0ba62f97304b38bf7c99');
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
	ended_at DATETIME, threshold BIGINT, 
	CONSTRAINT pk_rounds PRIMARY KEY (run_id, number, attempt), 
	CONSTRAINT fk_rounds_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "rounds" VALUES('20261101-000000-0001',1,1,'committed',NULL,'committed',2,0,0,0,0,1000,2.5,'{"training": 2.0}','2026-11-01 00:00:04.000000','2026-11-01 00:00:07.000000','2026-11-01 00:00:07.000000',NULL);
INSERT INTO "rounds" VALUES('20261101-000000-0001',2,1,'open',NULL,'open',0,0,0,0,0,0,NULL,'{}','2026-11-01 00:00:09.000000','2026-11-01 00:00:09.000000',NULL,NULL);
CREATE TABLE runs (
	run_id TEXT NOT NULL, 
	flower_run_id TEXT NOT NULL, 
	mode TEXT NOT NULL, 
	status TEXT NOT NULL, 
	reason TEXT, 
	config JSON NOT NULL, 
	model_fingerprint TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	ended_at DATETIME, lease_until DATETIME, 
	CONSTRAINT pk_runs PRIMARY KEY (run_id)
);
INSERT INTO "runs" VALUES('20261101-000000-0001','4711','simulation','running',NULL,'{"num-rounds": 3, "secagg": "off"}','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','2026-11-01 00:00:01.000000',NULL,'2026-11-01 00:00:21.000000');
CREATE TABLE trunkline_schema (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT trunkline_schema_pkc PRIMARY KEY (version_num)
);
INSERT INTO "trunkline_schema" VALUES('0005');
CREATE INDEX ix_runs_created_at ON runs (created_at);
CREATE INDEX ix_runs_flower_run_id ON runs (flower_run_id);
CREATE UNIQUE INDEX uq_rounds_open ON rounds (run_id) WHERE status = 'open';
CREATE UNIQUE INDEX uq_rounds_committed ON rounds (run_id, number) WHERE status = 'committed';
CREATE INDEX ix_participations_node_id ON participations (node_id);
CREATE INDEX ix_events_run_id_event_id ON events (run_id, event_id);
CREATE INDEX ix_privacy_units_client_level ON privacy_units (client, level);
CREATE INDEX ix_privacy_rows_run_round_attempt ON privacy_rows (run, round, attempt);
CREATE TRIGGER privacy_rows_no_update BEFORE UPDATE ON privacy_rows BEGIN SELECT RAISE(ABORT, 'privacy_rows is append-only: no UPDATE'); END;
CREATE TRIGGER privacy_rows_no_delete BEFORE DELETE ON privacy_rows BEGIN SELECT RAISE(ABORT, 'privacy_rows is append-only: no DELETE'); END;
CREATE TRIGGER privacy_rows_no_replace BEFORE INSERT ON privacy_rows WHEN EXISTS (SELECT 1 FROM privacy_rows WHERE unit_id = NEW.unit_id AND seq = NEW.seq OR unit_id = NEW.unit_id AND run = NEW.run AND round = NEW.round AND attempt = NEW.attempt AND channel = NEW.channel AND state = NEW.state) BEGIN SELECT RAISE(ABORT, 'privacy_rows is append-only: there is such a row already'); END;
CREATE TRIGGER privacy_heads_no_update BEFORE UPDATE ON privacy_heads BEGIN SELECT RAISE(ABORT, 'privacy_heads is append-only: no UPDATE'); END;
CREATE TRIGGER privacy_heads_no_delete BEFORE DELETE ON privacy_heads BEGIN SELECT RAISE(ABORT, 'privacy_heads is append-only: no DELETE'); END;
CREATE TRIGGER privacy_heads_no_replace BEFORE INSERT ON privacy_heads WHEN EXISTS (SELECT 1 FROM privacy_heads WHERE source = NEW.source AND unit_id = NEW.unit_id AND signer = NEW.signer AND seq = NEW.seq AND run = NEW.run AND round = NEW.round AND attempt = NEW.attempt) BEGIN SELECT RAISE(ABORT, 'privacy_heads is append-only: there is such a row already'); END;
COMMIT;
