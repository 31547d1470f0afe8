BEGIN TRANSACTION;
CREATE TABLE audit (
	sequence INTEGER NOT NULL, 
	time_ns BIGINT NOT NULL, 
	body BLOB NOT NULL, 
	digest BLOB NOT NULL, 
	PRIMARY KEY (sequence)
);
CREATE TABLE changes (
	revision INTEGER NOT NULL, 
	kind VARCHAR(24) NOT NULL, 
	subject INTEGER NOT NULL, 
	template_id VARCHAR(32) NOT NULL, 
	PRIMARY KEY (revision)
);
INSERT INTO "changes" VALUES(1,'SUBJECT',1,'');
INSERT INTO "changes" VALUES(2,'TEMPLATE_ADDED',1,'d2266dc88884d86c4261c798ab6c29ca');
INSERT INTO "changes" VALUES(3,'SUBJECT',1,'');
INSERT INTO "changes" VALUES(4,'SUBJECT',4,'');
INSERT INTO "changes" VALUES(5,'TEMPLATE_ADDED',4,'1703c96a96a01b44df24deb5fd2a55bf');
INSERT INTO "changes" VALUES(6,'SUBJECT',4,'');
INSERT INTO "changes" VALUES(7,'SUBJECT',7,'');
INSERT INTO "changes" VALUES(8,'TEMPLATE_ADDED',7,'17d73508ccc9a3341945c8d662c192d4');
INSERT INTO "changes" VALUES(9,'SUBJECT',7,'');
INSERT INTO "changes" VALUES(10,'SUBJECT_REMOVED',7,'');
CREATE TABLE chips (
	template_id VARCHAR(32) NOT NULL, 
	encoding VARCHAR(16) NOT NULL, 
	chip BLOB NOT NULL, 
	PRIMARY KEY (template_id), 
	FOREIGN KEY(template_id) REFERENCES templates (template_id) ON DELETE CASCADE
);
CREATE TABLE counters (
	name VARCHAR(64) NOT NULL, 
	value BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "counters" VALUES('gallery',10);
INSERT INTO "counters" VALUES('audit',0);
INSERT INTO "counters" VALUES('events',0);
CREATE TABLE event_subjects (
	sequence INTEGER NOT NULL, 
	subject INTEGER NOT NULL, 
	PRIMARY KEY (sequence, subject), 
	FOREIGN KEY(sequence) REFERENCES events (sequence) ON DELETE CASCADE, 
	FOREIGN KEY(subject) REFERENCES subjects (id) ON DELETE CASCADE
);
CREATE TABLE events (
	sequence INTEGER NOT NULL, 
	kind VARCHAR(32) NOT NULL, 
	time_ns BIGINT NOT NULL, 
	source_id VARCHAR(256) NOT NULL, 
	stream_id VARCHAR(256) NOT NULL, 
	gallery_id VARCHAR(128) NOT NULL, 
	body BLOB NOT NULL, 
	PRIMARY KEY (sequence)
);
CREATE TABLE galleries (
	gallery_id VARCHAR(128) NOT NULL, 
	settings JSON NOT NULL, 
	created_ns BIGINT NOT NULL, 
	PRIMARY KEY (gallery_id)
);
INSERT INTO "galleries" VALUES('default','{}',1795818151682771227);
INSERT INTO "galleries" VALUES('staff','{}',1795818151770736311);
CREATE TABLE keys (
	key_id VARCHAR(64) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	subject INTEGER, 
	wrapped BLOB NOT NULL, 
	wrapped_by VARCHAR(64) NOT NULL, 
	created_ns BIGINT NOT NULL, 
	PRIMARY KEY (key_id)
);
CREATE TABLE meta (
	name VARCHAR(64) NOT NULL, 
	value VARCHAR(1024) NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "meta" VALUES('store_id','f63bbc44c80a2da5');
CREATE TABLE requests (
	gallery_id VARCHAR(128) NOT NULL, 
	request_id VARCHAR(128) NOT NULL, 
	fingerprint BLOB NOT NULL, 
	template_id VARCHAR(32) NOT NULL, 
	answer JSON, 
	created_ns BIGINT NOT NULL, 
	PRIMARY KEY (gallery_id, request_id)
);
INSERT INTO "requests" VALUES('default','1bdb8e3396e9653944b594194400437abf134040f8288c7d6c44b5edddc261b8',X'6666666666666666666666666666666666666666666666666666666666666666','d2266dc88884d86c4261c798ab6c29ca','{"said": "ada"}',1795818151718962044);
INSERT INTO "requests" VALUES('staff','57f9e2a727bbbd205f04646ba2726cde4615418e2ac2ab2be7de95a1fae80344',X'6666666666666666666666666666666666666666666666666666666666666666','1703c96a96a01b44df24deb5fd2a55bf','{"said": "bo"}',1795818151780523406);
INSERT INTO "requests" VALUES('staff','80dbf8627074d103c1dc0dceab08fb352ad445d9bde3deb247d34b8884cf2b25',X'6666666666666666666666666666666666666666666666666666666666666666','17d73508ccc9a3341945c8d662c192d4',NULL,1795818151793334351);
CREATE TABLE schema_version (
	version INTEGER
);
INSERT INTO "schema_version" VALUES(3);
CREATE TABLE shards (
	shard_id VARCHAR(64) NOT NULL, 
	host VARCHAR(128) NOT NULL, 
	process VARCHAR(64) NOT NULL, 
	revision BIGINT NOT NULL, 
	lease_until_ns BIGINT NOT NULL, 
	PRIMARY KEY (shard_id)
);
CREATE TABLE subjects (
	id INTEGER NOT NULL, 
	gallery_id VARCHAR(128) NOT NULL, 
	subject_id VARCHAR(128) NOT NULL, 
	display_name VARCHAR(256) NOT NULL, 
	labels JSON NOT NULL, 
	etag VARCHAR(32) NOT NULL, 
	created_ns BIGINT NOT NULL, 
	updated_ns BIGINT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (gallery_id, subject_id)
);
INSERT INTO "subjects" VALUES(1,'default','ada','Ada','{"k": "v"}','8c24fe50c7282182',1795818151682771227,1795818151763514753);
INSERT INTO "subjects" VALUES(4,'staff','bo','Bo','{"k": "v"}','3b470dad4ea8571c',1795818151770736311,1795818151784863406);
CREATE TABLE templates (
	id INTEGER NOT NULL, 
	template_id VARCHAR(32) NOT NULL, 
	subject INTEGER NOT NULL, 
	model_id VARCHAR(256) NOT NULL, 
	dim INTEGER NOT NULL, 
	vector BLOB NOT NULL, 
	ood_score FLOAT NOT NULL, 
	created_ns BIGINT NOT NULL, 
	quality FLOAT DEFAULT '0' NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (template_id), 
	FOREIGN KEY(subject) REFERENCES subjects (id) ON DELETE CASCADE
);
INSERT INTO "templates" VALUES(1,'d2266dc88884d86c4261c798ab6c29ca',1,'m@1#aa',8,X'522C8AAC8035352B9AB436329A391138',0.9,1795818151704748845,0.5);
INSERT INTO "templates" VALUES(2,'1703c96a96a01b44df24deb5fd2a55bf',4,'m@1#aa',8,X'5E31613622310FB90737EE322BB48334',0.9,1795818151779752310,0.5);
CREATE INDEX ix_requests_template_id ON requests (template_id);
CREATE INDEX ix_requests_created_ns ON requests (created_ns);
CREATE INDEX ix_events_time_ns ON events (time_ns);
CREATE INDEX ix_keys_subject ON keys (subject);
CREATE INDEX ix_keys_wrapped_by ON keys (wrapped_by);
CREATE INDEX ix_templates_model_id ON templates (model_id);
CREATE INDEX ix_templates_subject ON templates (subject);
CREATE INDEX ix_event_subjects_subject ON event_subjects (subject);
COMMIT;
